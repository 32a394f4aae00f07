"""The forward's consumer without a gap between tiles, for full masks: all rows need the same keys.

As `_consumer` of forward.py, but the first scores of a tile are issued before the last product of
the tile before, so that the tensor cores work through its last softmax and its epilogue:

    tile n    ... | Sj | Pj-1 Vj-1 | softmax Sj |
    between         S'0 = Q' K'0 issued, then Pn Vn behind it; softmax S'0 while Pn Vn runs;
                    O / l -> shared -> global
    tile n + 1                      | S'1 | P'0 V'0 | ...

After the last tile the product S'0 is void: it is computed, since a branch around a product
serialises the pipeline, and nobody reads it. Under a causal mask, and so with ALiBi, this was never
faster than `_consumer`, which those calls take.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.forward_parts import (
    first_scores,
    first_softmax,
    key_step,
    pass_by,
    store_lse,
    store_out,
    whole_total,
)
from kernels.attention.hopper.schedule import tile_at


@gluon.jit
def chained_consumer(
    results, biases, scale, rings, out_smem, sizes,
    W: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, EDGE: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: rows [64 W, 64 W + 64) of every tile."""
    out_desc, lse_ptr = results
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_ring, k_ring, v_ring, _ticket = rings
    q_smem, q_full, q_empty = q_ring
    k_smem, k_full, kv_empty = k_ring
    v_smem, v_full = v_ring
    H, T, S, n_heads, n_tiles, chunk = sizes
    DTYPE: gl.constexpr = out_desc.dtype
    n_positions = n_tiles * n_heads
    n_iter = (S + BN - 1) // BN  # key tiles
    seen = (0, 0, 0, 0)

    position = gl.program_id(0)  # there are at most as many programs as tiles
    rank, head = tile_at(position, n_tiles, n_heads, chunk)
    row = (rank * CONSUMERS + W) * 64
    it = n_iter * 0  # a number of the device: the loop below cannot start from a constant
    turn = 0
    place = W
    mbarrier.wait(q_full.index(place), 0)
    mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
    q = q_smem.index(place).reshape([64, D])
    k = k_smem.index(it % STAGES).reshape([BN, D])
    qk = first_scores(q, k, W, BN, False)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    mbarrier.arrive(kv_empty.index(it % STAGES), count=1)
    p, peak, total, ramp = first_softmax(
        qk, head, row, (n_iter - 1) * BN, seen, biases, scale, sizes,
        W, BN, False, 0, EDGE, False, False, SOFTCAP, SINKS, DTYPE,
    )  # fmt: skip
    p16 = gl.convert_layout(p, P_LAYOUT)
    it += 1
    while position < n_positions:
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        q = q_smem.index(place).reshape([64, D])
        mine = n_iter
        if row >= T:  # none of the 64 rows is there: the other warpgroups get the tensor cores
            mine = n_iter * 0 + 1
        for i in range(1, mine):
            p16, acc, peak, total = key_step(
                q, p16, acc, peak, total, i, it, (n_iter - 1 - i) * BN, row, seen, ramp,
                biases[2], scale, k_ring, v_ring, sizes, D, BN, S_LAYOUT, O_LAYOUT, STAGES, False,
                0, EDGE, False, SOFTCAP, DTYPE,
            )  # fmt: skip
            it += 1
        it = pass_by(n_iter - mine, it, k_ring, v_ring, STAGES)
        mbarrier.arrive(q_empty.index(place), count=1)

        turn += 1
        position += gl.num_programs(0)
        place = W + CONSUMERS * (turn & 1)
        more = position < n_positions
        # past the end the tile is that of position 0, and none of it is waited for or used
        rank, next_head = tile_at(gl.where(more, position, 0), n_tiles, n_heads, chunk)
        next_row = (rank * CONSUMERS + W) * 64
        last = it - 1
        if more:
            mbarrier.wait(q_full.index(place), (turn // 2) & 1)
            mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
        q = q_smem.index(place).reshape([64, D])
        k = k_smem.index(it % STAGES).reshape([BN, D])
        qk = first_scores(q, k, W, BN, False)
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        v = v_smem.index(last % STAGES).reshape([BN, D])
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        qk = warpgroup_mma_wait(1, deps=(qk,))
        sums = whole_total(total, ROW)
        store_lse(lse_ptr, peak, sums, ramp, head, row, T, scale, ROW, False)
        share = gl.convert_layout(1.0 / sums, ROW_O)
        p, peak, total, ramp = first_softmax(
            qk, next_head, next_row, (n_iter - 1) * BN, seen, biases, scale, sizes,
            W, BN, False, 0, EDGE, False, False, SOFTCAP, SINKS, DTYPE,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if more:
            mbarrier.arrive(kv_empty.index(it % STAGES), count=1)
        p16 = gl.convert_layout(p, P_LAYOUT)
        it += 1
        store_out(out_desc, out_smem, acc * share[:, None], head, row, H, W, D)
        head = next_head
        row = next_row
    tma.store_wait(0)
