"""dQ of the backward: its product, and how it gets added up in global memory.

Dims: BM queries of a tile (64 or 128), BN = 128 keys, D head size; a consumer warpgroup makes C
columns of 64 rows of dQ: half the columns where BM is 64, half the rows where it is 128.

Both consumers of all programs add to dQ, in fp32, in one of these ways (DQ in the kernel):
    tiles       through shared memory, by the copy engine, row by row
    fragments   the same, but in the order in which the threads hold it
    registers   straight from the registers, in that order too: four numbers at a time, and a warp
                adds to 512 bytes in a row. No shared memory is used
In that order the 64 x C numbers of a consumer stand together: quads of a thread, of two columns of
two rows 8 apart, then threads, then groups of 8 columns; rows.py has the way back.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)

from kernels.attention.hopper.shim import counting, tma_add


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
def _as_held(dq, C: gl.constexpr):
    """dq [64, C] in the order in which the four warps hold it; moves nothing."""
    dq = dq.reshape([4, 2, 8, C // 8, 4, 2])  # warp, 8 rows, row, 8 columns, lane of 4, column
    return dq.permute((3, 0, 2, 4, 1, 5)).reshape([64 * C])


@gluon.jit
def add_to_dq(
    dq_to, dq_smem, dq, row, W: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, DQ: gl.constexpr
):  # fmt: skip
    """Add this consumer's part of dQ to the query tile that starts at `row` of the buffer.

    Args:
        dq_to: the buffer [rows, D] fp32: a pointer for `registers`, else a descriptor of
            [64, C] of it, or for `fragments` of 64 C / 32 rows of the buffer seen as [..., 32].
        dq_smem: staging, [2, 64, C], for `fragments` [2, 64 C / 32, 32].
        dq: [64, C].
    """
    C: gl.constexpr = D // 2 if BM == 64 else D
    if DQ == "registers":
        held = _as_held(dq, C)
        place = gl.cast(row, gl.int64) * D + W * 64 * C
        gl.atomic_add(dq_to + place + counting(held), held, sem="relaxed")
    else:
        tma.store_wait(0)  # the part before has left the staging buffer
        if DQ == "fragments":
            dq_smem.index(W).store(_as_held(dq, C).reshape([2 * C, 32]))
        else:
            dq_smem.index(W).store(dq)
        fence_async_shared()
        if DQ == "fragments":
            tma_add(dq_to, [row * (D // 32) + W * 2 * C, 0], dq_smem.index(W))
        elif BM == 64:
            tma_add(dq_to, [row, W * (D // 2)], dq_smem.index(W))
        else:
            tma_add(dq_to, [row + W * 64, 0], dq_smem.index(W))
