"""The backward's loading warp: Q, dO and their row statistics tile by tile, K and V turn by turn.

Dims: BM queries of a tile, BN = 128 keys, GROUP = H / H_kv. See backward.py.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.backward_parts import BN, query_at
from kernels.attention.hopper.ends import hand_over
from kernels.attention.hopper.masks import query_tiles
from kernels.attention.hopper.schedule import draw, drawn, tile_at
from kernels.attention.hopper.shim import tma_load


@gluon.jit
def producer(
    sources, rings, counter_ptr, sizes, limits, ends,
    BM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    LIMITS: gl.constexpr,
):  # fmt: skip
    """One warp: loads Q, dO and their row statistics, and K and V of each key tile."""
    q_desc, k_desc, v_desc, do_desc, stats_desc = sources
    q_ring, do_ring, kv, ticket = rings
    q_smem, lse_smem, q_full, q_empty = q_ring
    do_smem, delta_smem, do_full = do_ring
    k_smem, v_smem, kv_full, kv_empty = kv
    H_kv, T, S, n_heads, n_tiles, chunk = sizes
    rows = (T + BM - 1) // BM  # of lse in `stats_desc`, per head; delta stands behind all lse
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        b = head // H_kv
        h = head - b * H_kv
        first, per_head = query_tiles(rank * BN, b, T, S, limits, BM, BN, CAUSAL, LIMITS)
        hand_over(rank * BN, (first, per_head), turn, b, T, S, limits, ends, 2, 2, True, LIMITS)
        number = 0
        for i in range(per_head * GROUP):
            if i == per_head * GROUP - 1:  # late: who draws a tile is about to start it
                number = draw(counter_ptr)
            s = it % STAGES
            member, query = query_at(i, first, per_head, BM, GROUP)
            row = (head * GROUP + member) * rows + query // BM
            mbarrier.wait(q_empty.index(s), ((it // STAGES) & 1) ^ 1)
            at = [b, query, h * GROUP + member, 0]
            mbarrier.expect(
                q_full.index(s), q_desc.block_type.nbytes + stats_desc.block_type.nbytes
            )
            tma_load(q_desc, at, q_full.index(s), q_smem.index(s))
            tma_load(stats_desc, [row, 0], q_full.index(s), lse_smem.index(s))
            if i == 0:
                mbarrier.wait(kv_empty, (turn & 1) ^ 1)
                mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                tma_load(k_desc, [b, rank * BN, h, 0], kv_full, k_smem.index(0))
                tma_load(v_desc, [b, rank * BN, h, 0], kv_full, v_smem.index(0))
            mbarrier.expect(
                do_full.index(s), do_desc.block_type.nbytes + stats_desc.block_type.nbytes
            )
            tma_load(do_desc, at, do_full.index(s), do_smem.index(s))
            tma_load(
                stats_desc, [row + n_heads * GROUP * rows, 0], do_full.index(s), delta_smem.index(s)
            )
            it += 1
        position = drawn(number, n_tiles * n_heads, turn, counter_ptr, ticket)
        turn += 1
