"""The backward's consumer that issues the scores of the next tile before it is done with this one.

As `_consumer` of backward.py, with S' a tile ahead beside dQ a tile behind: while a warpgroup adds
its dQ to global memory, the tensor cores work on its next scores; while it takes the exponentials,
on dP'. It never waits for a product that was not issued behind another one:

    consumer W, tile i    dP'i issued | exponentials of S'i | dV issued | dS'i -> buffer i % 2
                          dK, dQ(i-1), S'(i+1) issued, one behind the other
                          dK done: Q, dO free | dQ(i-1) done: added to global memory | S'(i+1) done

After the last tile of a turn S' is void: its own queries again, since a branch around a product
serialises the pipeline.

For plain causal and full masks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.backward_parts import BN, end_of_turn, masked_tiles
from kernels.attention.hopper.dq import add_to_dq, half_of_dq
from kernels.attention.hopper.masks import query_tiles
from kernels.attention.hopper.schedule import following, tile_at
from kernels.attention.hopper.scores import ALWAYS, LOG2_E, NEVER, minus_delta, probabilities


@gluon.jit
def _tile(
    dk, dv, st, it, left, query, row_before, key, ramp,
    results, bend, scale, rings, staging, S, past,
    W: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, RAGGED: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """dk, dv, and S' of the next tile, after a tile whose S' is `st`; the turn has `left` more.

    row_before: where the tile before starts in the buffer of dQ, below 0 if it is another turn's.
    """
    dq_desc, dk_desc, _dv_desc = results
    q_ring, do_ring, kv, _ticket = rings
    ds_ring, dq_smem, places = staging
    DQ_COLS: gl.constexpr = D // 2 if BM == 64 else D
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLS, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    DTYPE: gl.constexpr = dk_desc.dtype
    q_smem, lse_smem, q_full, q_empty = q_ring
    do_smem, delta_smem, do_full = do_ring
    k_smem, v_smem, _full, _empty = kv
    ds_smem, ds_full, ds_empty = ds_ring
    nothing = gl.zeros([64, BM], gl.float32, S_LAYOUT)
    s = it % STAGES
    # always 0, but the compiler cannot know: else it keeps the 24 descriptors of the products with
    # K and V in 48 registers through the loop, and spills
    zero = it >> 30
    k_all = k_smem.index(zero).reshape([BN, D])
    k = k_all.slice(W * 64, 64, 0)
    v = v_smem.index(zero).reshape([BN, D]).slice(W * 64, 64, 0)
    do = do_smem.index(s).reshape([BM, D])
    mbarrier.wait(do_full.index(s), (it // STAGES) & 1)
    start = minus_delta(delta_smem.index(s), nothing, BM, COL)
    dp = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
    lse = lse_smem.index(s).reshape([BM]).load(COL)
    p, weight = probabilities(
        st, lse, places, (0, 0, 0, 0), ramp, scale * LOG2_E, bend, key, query, S, past, BM,
        S_LAYOUT, CAUSAL, 0, RAGGED, ALIBI, SOFTCAP, DTYPE, BN - 1 - W * 64, MASK,
    )  # fmt: skip
    p16 = p.to(DTYPE)
    dv = warpgroup_mma(gl.convert_layout(p16, P_LAYOUT), do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (weight * dp).to(DTYPE)

    here = it % 2
    other = (it + 1) % 2
    # both consumers have used what was here two tiles ago
    mbarrier.wait(ds_empty.index(here), ((it // 2) & 1) ^ ((it + 1) & 1))
    ds_smem.index(here).slice(W * 64, 64, 0).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(here), count=1)
    q = q_smem.index(s).reshape([BM, D])
    dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=(dv,))

    mbarrier.wait(ds_full.index(other), (((it + 1) // 2) & 1) ^ 1)  # passes at it = 0
    dq = half_of_dq(ds_smem.index(other), k_all, W, BM, D, DQ_LAYOUT)
    then = it + gl.minimum(left, 1)  # at the last tile its own queries again
    mbarrier.wait(q_full.index(then % STAGES), (then // STAGES) & 1)
    q = q_smem.index(then % STAGES).reshape([BM, D])
    st = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma_wait(2, deps=(dk,))
    if left > 0:
        mbarrier.arrive(q_empty.index(s), count=1)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    mbarrier.arrive(ds_empty.index(other), count=1)
    if row_before >= 0:
        add_to_dq(dq_desc, dq_smem, dq, row_before, W, BM, D)
    st = warpgroup_mma_wait(0, deps=(st,))
    return dk, dv, st


@gluon.jit
def ahead_consumer(
    results, biases, scale, rings, staging, sizes,
    W: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, RAGGED: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: keys [64 W, 64 W + 64) of every key tile."""
    q_ring, _do_ring, kv, ticket = rings
    slopes_ptr, bend = biases
    DQ_COLS: gl.constexpr = D // 2 if BM == 64 else D
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLS, 16])
    q_smem, _lse, q_full, q_empty = q_ring
    k_smem, _v, kv_full, _kv_empty = kv
    H_kv, T, S, n_heads, n_tiles, chunk = sizes
    past = S - T
    padded = (T + BM - 1) // BM * BM  # rows of a head in the dQ buffer
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        b = head // H_kv
        first, per_head = query_tiles(rank * BN, b, T, S, (0, 0, 0), BM, BN, CAUSAL, 0)
        key = rank * BN + W * 64
        left = per_head * GROUP
        n_masked = masked_tiles(key, first, per_head, S, past, BM, BN - 1 - W * 64, CAUSAL, RAGGED)
        row_before = -1
        dk = gl.zeros([64, D], gl.float32, O_LAYOUT)
        dv = gl.zeros([64, D], gl.float32, O_LAYOUT)
        mbarrier.wait(kv_full, turn & 1)
        k = k_smem.index(0).reshape([BN, D]).slice(W * 64, 64, 0)
        mbarrier.wait(q_full.index(it % STAGES), (it // STAGES) & 1)
        q = q_smem.index(it % STAGES).reshape([BM, D])
        nothing = gl.zeros([64, BM], gl.float32, S_LAYOUT)
        st = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        st = warpgroup_mma_wait(0, deps=(st,))
        for member in range(GROUP):
            start = (head * GROUP + member) * padded  # in the buffer of dQ
            row = start + first
            ramp = 0.0
            if ALIBI:
                ramp = gl.load(slopes_ptr + (head * GROUP + member) % (H_kv * GROUP)) * LOG2_E
            if CAUSAL or RAGGED:
                for _ in range(n_masked):
                    left -= 1
                    dk, dv, st = _tile(
                        dk, dv, st, it, left, row - start, row_before, key, ramp,
                        results, bend, scale, rings, staging, S, past, W, D, BM, STAGES,
                        CAUSAL, RAGGED, ALIBI, SOFTCAP, ALWAYS,
                    )  # fmt: skip
                    row_before = row
                    row = row + BM
                    it += 1
            for _ in range(n_masked, per_head):
                left -= 1
                dk, dv, st = _tile(
                    dk, dv, st, it, left, row - start, row_before, key, ramp,
                    results, bend, scale, rings, staging, S, past, W, D, BM, STAGES,
                    CAUSAL, RAGGED, ALIBI, SOFTCAP, NEVER,
                )  # fmt: skip
                row_before = row
                row = row + BM
                it += 1

        mbarrier.arrive(q_empty.index((it - 1) % STAGES), count=1)
        end_of_turn(
            results, rings, staging, dk * scale, dv, it - 1, row_before, b, key,
            head - b * H_kv, W, BM, D, DQ_LAYOUT,
        )  # fmt: skip
        turn += 1
        position = following(turn, ticket)
    tma.store_wait(0)
