"""Attention, backward, for Hopper: five products per tile in one kernel.

Dims: B batch, T queries, S keys, H heads, D head size, GROUP = H / H_kv, BM queries of a tile
(64 or 128), BN = 128 keys of a tile, 64 for each of two consumer warpgroups.

A program owns a tile of keys, keeps its K and V in shared memory and dK and dV in registers, and
walks over the query tiles of all heads of the group. With everything transposed, keys are rows:

    S' = K Q'    P' = exp2(scale S' - lse)      dP' = V dO'    dS' = P' (dP' - delta)
    dV += P' dO              dK += dS' Q         dQ += dS K    (dS through shared memory)

dQ needs the dS of both consumers. So that neither waits for the other, dQ is a tile behind:

    consumer W, tile i    S'i, dP'i, softmax, dV | dS'i -> buffer i % 2, arrive `ds_full`
                          dK | wait `ds_full` of i - 1, its half of dQ(i-1), arrive `ds_empty`
                          dQ(i-1) -> shared -> added to global memory, fp32, by the copy engine
    producer              Q, lse, dO, delta of tile i + STAGES - 1; K, V of the next key tile

In the prototype, on one H200 at D = 128, that made 544 TFLOP/s of 406 with both consumers in
lockstep. The buffers need both barriers: without `ds_empty` dQ was off by 0.01 to 0.1 in some runs.

Its half of dQ is half the columns when BM = 64 and 64 of the rows when BM = 128. In the first
turn on a new key tile the product of "the tile before" is void: it is computed, since a branch
around a product serialises the pipeline, and not added.
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

from kernels.attention.hopper.backward_ahead import ahead_consumer
from kernels.attention.hopper.backward_parts import BN, end_of_turn, queries_seen, query_at
from kernels.attention.hopper.backward_producer import producer
from kernels.attention.hopper.dq import add_to_dq, half_of_dq
from kernels.attention.hopper.ends import room_for_ends
from kernels.attention.hopper.schedule import following, tile_at
from kernels.attention.hopper.scores import ASK, LOG2_E, minus_delta, probabilities


@gluon.jit
def _consumer(
    results, biases, scale, rings, staging, sizes, limits, ends,
    W: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LIMITS: gl.constexpr, RAGGED: gl.constexpr, ALIBI: gl.constexpr,
    SOFTCAP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: keys [64 W, 64 W + 64) of every key tile."""
    dq_desc, dk_desc, _dv_desc = results
    q_ring, do_ring, kv, ticket = rings
    ds_ring, dq_smem, places = staging
    slopes_ptr, bend = biases
    DQ_COLS: gl.constexpr = D // 2 if BM == 64 else D
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLS, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    DTYPE: gl.constexpr = dk_desc.dtype
    q_smem, lse_smem, q_full, q_empty = q_ring
    do_smem, delta_smem, do_full = do_ring
    k_smem, v_smem, kv_full, _kv_empty = kv
    ds_smem, ds_full, ds_empty = ds_ring
    H_kv, T, S, n_heads, n_tiles, chunk = sizes
    past = S - T
    padded = (T + BM - 1) // BM * BM  # rows of a head in the dQ buffer
    nothing = gl.zeros([64, BM], gl.float32, S_LAYOUT)
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        b = head // H_kv
        key = rank * BN + W * 64
        first, per_head, seen = queries_seen(
            key, turn, b, T, S, limits, ends, W, BM, CAUSAL, LIMITS
        )
        start = head * GROUP * padded  # of this head in the dQ buffer
        row_before = 0
        dk = gl.zeros([64, D], gl.float32, O_LAYOUT)
        dv = gl.zeros([64, D], gl.float32, O_LAYOUT)
        mbarrier.wait(kv_full, turn & 1)
        for i in range(per_head * GROUP):
            s = it % STAGES
            phase = (it // STAGES) & 1
            member, query = query_at(i, first, per_head, BM, GROUP)
            # always 0, but the compiler cannot know: else it keeps the 24 descriptors of the
            # products with K and V in 48 registers through the loop, and spills
            zero = it >> 30
            k_all = k_smem.index(zero).reshape([BN, D])
            k = k_all.slice(W * 64, 64, 0)
            v = v_smem.index(zero).reshape([BN, D]).slice(W * 64, 64, 0)
            q = q_smem.index(s).reshape([BM, D])
            do = do_smem.index(s).reshape([BM, D])
            mbarrier.wait(q_full.index(s), phase)
            if EARLY:
                mbarrier.wait(do_full.index(s), phase)
                st = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
                st = warpgroup_mma_wait(1, deps=(st,))
            else:
                st = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                st = warpgroup_mma_wait(0, deps=(st,))
            ramp = 0.0
            if ALIBI:
                ramp = gl.load(slopes_ptr + (head * GROUP + member) % (H_kv * GROUP)) * LOG2_E
            lse = lse_smem.index(s).reshape([BM]).load(COL)
            p, weight = probabilities(
                st, lse, places, seen, ramp, scale * LOG2_E, bend, key, query, S, past, BM,
                S_LAYOUT, CAUSAL, LIMITS, RAGGED, ALIBI, SOFTCAP, DTYPE, BN - 1 - W * 64, ASK,
            )  # fmt: skip
            if not EARLY:
                mbarrier.wait(do_full.index(s), phase)
                less = minus_delta(delta_smem.index(s), nothing, BM, COL)
                dp = warpgroup_mma(v, do.permute((1, 0)), less, is_async=True)
            p16 = p.to(DTYPE)
            if EARLY:
                dp = warpgroup_mma_wait(0, deps=(dp,))
                dv = warpgroup_mma(gl.convert_layout(p16, P_LAYOUT), do, dv, is_async=True)
                dp = dp + minus_delta(delta_smem.index(s), nothing, BM, COL)
            else:
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
            dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q, dk, is_async=True)
            dv = warpgroup_mma_wait(1, deps=(dv,))

            mbarrier.wait(ds_full.index(other), (((it + 1) // 2) & 1) ^ 1)  # passes at it = 0
            dq = half_of_dq(ds_smem.index(other), k_all, W, BM, D, DQ_LAYOUT)
            dk = warpgroup_mma_wait(1, deps=(dk,))
            mbarrier.arrive(q_empty.index(s), count=1)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(ds_empty.index(other), count=1)
            if i > 0:
                add_to_dq(dq_desc, dq_smem, dq, row_before, W, BM, D)
            row_before = start + member * padded + query
            it += 1

        if LIMITS:
            mbarrier.arrive(ends[4].index(turn % 2), count=1)
        end_of_turn(
            results, rings, staging, dk * scale, dv, it - 1, row_before, head // H_kv, key,
            head % H_kv, W, BM, D, DQ_LAYOUT,
        )  # fmt: skip
        turn += 1
        position = following(turn, ticket)
    tma.store_wait(0)


@gluon.jit
def _work(
    results, biases, scale, rings, staging, sizes, limits, ends,
    W: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LIMITS: gl.constexpr, RAGGED: gl.constexpr, ALIBI: gl.constexpr,
    SOFTCAP: gl.constexpr, EARLY: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A consumer, of either kind."""
    if AHEAD:
        ahead_consumer(
            results, biases, scale, rings, staging, sizes, W, D, BM, GROUP, STAGES, CAUSAL,
            RAGGED, ALIBI, SOFTCAP,
        )  # fmt: skip
    else:
        _consumer(
            results, biases, scale, rings, staging, sizes, limits, ends, W, D, BM, GROUP,
            STAGES, CAUSAL, LIMITS, RAGGED, ALIBI, SOFTCAP, EARLY,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["before", "after", "H_kv", "T", "S", "n_heads", "n_tiles", "chunk"])
def attention_bwd_kernel(
    q_desc, k_desc, v_desc, do_desc,  # [B, T or S, H or H_kv, D], blocks [1, rows, 1, D]
    stats_desc,  # [2 * B * H * tiles of BM queries, BM] fp32: lse in log2 units, then -delta
    dq_desc,  # dQ / scale [heads * T padded to BM, D] fp32, zero, in the order of dq.py
    dk_desc, dv_desc,  # [B, S, H_kv, D]
    slopes_ptr,  # [H] fp32
    bounds_ptr,  # [B, 2, T] int32: where each token's document starts and ends
    counter_ptr,  # [1] int32, zero before and after
    scale,
    cap,  # the soft cap in log2 units
    inner,  # scale / cap: what the products are multiplied by before tanh
    before, after,  # the window
    H_kv, T, S,
    n_heads,  # B * H_kv
    n_tiles,  # of a head
    chunk,  # heads whose tiles stand together
    D: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,  # and nothing else: no window, no documents
    LIMITS: gl.constexpr,  # see masks.py
    RAGGED: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr, EARLY: gl.constexpr,
    AHEAD: gl.constexpr,  # see backward_ahead.py
):  # fmt: skip
    """dK and dV of the key tiles this program gets, and what they add to dQ."""
    DTYPE: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], DTYPE)
    DQ_COLS: gl.constexpr = D // 2 if BM == 64 else D
    k_smem = gl.allocate_shared_memory(DTYPE, [1, 1, BN, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, 1, BN, 1, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BM, 1, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BM, 1, D], do_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], stats_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], stats_desc.layout)
    ds_smem = gl.allocate_shared_memory(DTYPE, [2, BN, BM], DS_LAYOUT)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 2 * DQ_COLS, 32], dq_desc.layout)
    places = gl.allocate_shared_memory(gl.int32, [128], FLAT)
    places.store(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])))
    ends = room_for_ends(2, 2, LIMITS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    slots = gl.allocate_shared_memory(gl.int32, [1, 1], FLAT)
    ticket_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    ticket_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    mbarrier.init(ticket_full.index(0), count=1)
    mbarrier.init(ticket_empty.index(0), count=2)

    ticket = (slots, ticket_full, ticket_empty)
    rings = (
        (q_smem, lse_smem, q_full, q_empty),
        (do_smem, delta_smem, do_full),
        (k_smem, v_smem, kv_full, kv_empty),
        ticket,
    )
    staging = ((ds_smem, ds_full, ds_empty), dq_smem, places)
    sources = (q_desc, k_desc, v_desc, do_desc, stats_desc)
    results = (dq_desc, dk_desc, dv_desc)
    sizes = (H_kv, T, S, n_heads, n_tiles, chunk)
    biases = (slopes_ptr, (cap, inner))
    limits = (before, after, bounds_ptr)
    # fmt: off
    gl.warp_specialize([
        (_work, (results, biases, scale, rings, staging, sizes, limits, ends, 0, D, BM, GROUP,
                 STAGES, CAUSAL, LIMITS, RAGGED, ALIBI, SOFTCAP, EARLY, AHEAD)),
        (_work, (results, biases, scale, rings, staging, sizes, limits, ends, 1, D, BM, GROUP,
                 STAGES, CAUSAL, LIMITS, RAGGED, ALIBI, SOFTCAP, EARLY, AHEAD)),
        (producer, (sources, rings, counter_ptr, sizes, limits, ends,
                    BM, GROUP, STAGES, CAUSAL, LIMITS)),
    ], [4, 1], [240, 24])
    # fmt: on
