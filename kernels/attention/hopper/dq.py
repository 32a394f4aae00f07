"""dQ of the backward: its product, and how it gets added up in global memory.

Dims: BM queries of a tile (64 or 128), BN = 128 keys, D head size; a consumer warpgroup makes C
columns of 64 rows of dQ: half the columns where BM is 64, half the rows where it is 128.

Both consumers of all programs add to dQ, in fp32: through shared memory, by the copy engine, in the
order in which the threads hold it, so that no two of them want the same bank. In that order the
64 x C numbers of a consumer stand together: quads of a thread, of two columns of two rows 8 apart,
then threads, then groups of 8 columns; rows.py has the way back.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)

from kernels.attention.hopper.shim import tma_add


@gluon.jit
def half_of_dq(ds, k, W: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Issue this consumer's part of dS K. ds [BN, BM] and k [BN, D] lie in shared memory."""
    if BM == 64:
        k = k.slice(W * (D // 2), D // 2, 1)
        nothing = gl.zeros([64, D // 2], gl.float32, LAYOUT)
    else:
        ds = ds.slice(W * 64, 64, 1)
        nothing = gl.zeros([64, D], gl.float32, LAYOUT)
    return warpgroup_mma(ds.permute((1, 0)), k, nothing, use_acc=False, is_async=True)


@gluon.jit
def add_to_dq(dq_desc, dq_smem, dq, row, W: gl.constexpr, BM: gl.constexpr, D: gl.constexpr):
    """Add this consumer's part of dQ to the query tile that starts at `row` of the buffer.

    Args:
        dq_desc: of the buffer [rows, D] fp32 seen as [rows * D / 32, 32], in blocks of 2 C rows.
        dq_smem: staging, [2, 2 C, 32].
        dq: [64, C].
    """
    C: gl.constexpr = D // 2 if BM == 64 else D
    dq = dq.reshape([4, 2, 8, C // 8, 4, 2])  # warp, 8 rows, row, 8 columns, lane of 4, column
    dq = dq.permute((3, 0, 2, 4, 1, 5)).reshape([2 * C, 32])  # moves nothing
    tma.store_wait(0)  # the part before has left the staging buffer
    dq_smem.index(W).store(dq)
    fence_async_shared()
    tma_add(dq_desc, [row * (D // 32) + W * 2 * C, 0], dq_smem.index(W))
