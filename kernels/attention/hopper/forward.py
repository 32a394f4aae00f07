"""Attention, forward, for Hopper: one warp of a program loads, two or three warpgroups compute.

Dims: B batch, T queries, S keys, H heads, D head size, GROUP = H / H_kv, BN keys of a tile,
CONSUMERS warpgroups of 64 query rows each, so a tile has BM = 64 * CONSUMERS queries.

A program walks over tiles of queries. Per tile, from the last key tile (where the masks are) to
the first, with x a barrier of shared memory and all loads and stores by the copy engine (TMA):

    producer    load Q ........ load K0 V0 | K1 V1 | ... STAGES deep, into the next tile's Q and K
    consumer    x Q x K0: S0 = Q K0'
                softmax S0 -> P0
                x K1: S1 = Q K1' issued, then x V0: O += P0 V0 issued behind it
                softmax S1 while P0 V0 runs; rescale O
                ...
                O += Pn Vn, O / l -> shared -> global while the next tile's loads run

K_j and V_{j-1} are let go together, by one barrier (kv_empty), because at each arrival the threads
of a warpgroup wait for each other.

S_j is issued before P_{j-1} V_{j-1}, so the tensor cores have work during the softmax: +6 to +16 %
measured on one H200. Descriptors are 4-D over [B, T, H, D], any strides: what lies past the end of
a sequence reads as zero and is not written, and no copy is made. D is the head size padded to 64,
128 or 256: the columns past the end of a head read as zero too.

Q has two places, so the next tile's loads while this one is worked on. At D = 256 there is room for
one and for no staging buffer: results leave through it, and the next Q loads behind them (SHARE).

Maths: Dao 2023, arXiv:2307.08691, Algorithm 1; scores stay unscaled, exponentials are powers of 2.
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

from kernels.attention.hopper.ends import hand_over, number_at, room_for_ends
from kernels.attention.hopper.forward_chained import chained_consumer
from kernels.attention.hopper.forward_parts import (
    first_scores,
    first_softmax,
    key_step,
    pass_by,
    store_lse,
    store_out,
    whole_total,
)
from kernels.attention.hopper.masks import key_tiles
from kernels.attention.hopper.schedule import draw, drawn, following, tile_at
from kernels.attention.hopper.shim import tma_load


@gluon.jit
def _producer(
    sources, rings, counter_ptr, sizes, limits, ends,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LIMITS: gl.constexpr, PLACES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """One warp: loads Q, K and V of every tile as soon as their places are free."""
    q_desc, k_desc, v_desc = sources
    q_ring, k_ring, v_ring, ticket = rings
    q_smem, q_full, q_empty = q_ring
    k_smem, k_full, kv_empty = k_ring
    v_smem, v_full = v_ring
    H, T, S, n_heads, n_tiles, chunk = sizes
    BM: gl.constexpr = CONSUMERS * 64
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < n_tiles * n_heads:
        number = 0
        if not CHAINED:
            number = draw(counter_ptr)
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        row = rank * BM
        if CAUSAL or LIMITS:
            row = (n_tiles - 1 - rank) * BM  # longest rows first
        b = head // H
        h = head - b * H
        low, n_iter = key_tiles(row, row + BM - 1, b, T, S, limits, BN, CAUSAL, LIMITS)
        hand_over(row, (low, n_iter), turn, b, T, S, limits, ends, 1, CONSUMERS, False, LIMITS)
        for w in gl.static_range(CONSUMERS):
            at = turn % PLACES * CONSUMERS + w
            mbarrier.wait(q_empty.index(at), ((turn // PLACES) & 1) ^ 1)
            mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes)
            tma_load(q_desc, [b, row + w * 64, h, 0], q_full.index(at), q_smem.index(at))
        for i in range(n_iter):
            s = it % STAGES
            phase = (it // STAGES) & 1
            key = (low + n_iter - 1 - i) * BN
            mbarrier.wait(kv_empty.index(s), phase ^ 1)
            mbarrier.expect(k_full.index(s), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, key, h // GROUP, 0], k_full.index(s), k_smem.index(s))
            then = it + 1  # V of STAGES before is let go at the step after its own
            mbarrier.wait(kv_empty.index(then % STAGES), ((then // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(s), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, key, h // GROUP, 0], v_full.index(s), v_smem.index(s))
            it += 1
        if CHAINED:
            position += gl.num_programs(0)
        else:
            position = drawn(number, n_tiles * n_heads, turn, counter_ptr, ticket)
        turn += 1


@gluon.jit
def _keys_seen(
    row, turn, b, T, S, limits, ends, W: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    ROW: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """(first key tile of the 64 rows from `row` on, how many; how many before and behind them only
    other rows of the tile see; for `keep_run`: first and behind the last key of each row, and which
    keys all 64 rows see)."""
    BM: gl.constexpr = CONSUMERS * 64
    before = 0
    behind = 0
    seen = (0, 0, 0, 0)
    if LIMITS:
        firsts, lasts, spans, full, empty = ends
        mbarrier.wait(full.index(0), turn & 1)
        first = firsts.index(W).load(ROW)
        limit = lasts.index(W).load(ROW) + 1
        seen = (first, limit, number_at(firsts.index(W), 63), number_at(lasts.index(W), 0))
        low = number_at(firsts.index(W), 0) // BN
        n_iter = number_at(lasts.index(W), 63) // BN + 1 - low
        all_low = number_at(spans.index(0), 0)
        before = low - all_low
        behind = all_low + number_at(spans.index(1), 0) - low - n_iter
        mbarrier.arrive(empty.index(0), count=1)
    else:
        start = row - W * 64
        low, n_iter = key_tiles(start, start + (BM - 1), b, T, S, limits, BN, CAUSAL, LIMITS)
        if SKIP:
            behind = n_iter
            low, n_iter = key_tiles(row, row + 63, b, T, S, limits, BN, CAUSAL, LIMITS)
            if row >= T:  # none of the 64 rows is there
                n_iter = low * 0 + 1
            behind -= n_iter
    return low, n_iter, before, behind, seen


@gluon.jit
def _consumer(
    results, biases, scale, rings, out_smem, sizes, limits, ends,
    W: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr, EDGE: gl.constexpr,
    SKIP: gl.constexpr, HALF: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr, SHARE: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: rows [64 W, 64 W + 64) of every tile."""
    out_desc, lse_ptr = results
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_ring, k_ring, v_ring, ticket = rings
    q_smem, q_full, q_empty = q_ring
    k_smem, k_full, kv_empty = k_ring
    v_smem, v_full = v_ring
    H, T, S, n_heads, n_tiles, chunk = sizes
    DTYPE: gl.constexpr = out_desc.dtype
    BM: gl.constexpr = CONSUMERS * 64
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        row = rank * BM + W * 64
        if CAUSAL or LIMITS:
            row = (n_tiles - 1 - rank) * BM + W * 64
        low, n_iter, before, behind, seen = _keys_seen(
            row, turn, head // H, T, S, limits, ends, W, CONSUMERS, BN, ROW, CAUSAL, LIMITS, SKIP
        )
        if SKIP:
            it = pass_by(behind, it, k_ring, v_ring, STAGES)

        s = it % STAGES
        key = (low + n_iter - 1) * BN
        place = turn % PLACES * CONSUMERS + W
        q = q_smem.index(place).reshape([64, D])
        mbarrier.wait(q_full.index(place), (turn // PLACES) & 1)
        mbarrier.wait(k_full.index(s), (it // STAGES) & 1)
        qk = first_scores(q, k_smem.index(s).reshape([BN, D]), W, BN, HALF)
        qk = warpgroup_mma_wait(0, deps=(qk,))
        mbarrier.arrive(kv_empty.index(s), count=1)
        p, peak, total, ramp = first_softmax(
            qk, head, row, key, seen, biases, scale, sizes,
            W, BN, CAUSAL, LIMITS, EDGE, HALF, ALIBI, SOFTCAP, SINKS, DTYPE,
        )  # fmt: skip
        p16 = gl.convert_layout(p, P_LAYOUT)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        it += 1
        for i in range(1, n_iter):
            p16, acc, peak, total = key_step(
                q, p16, acc, peak, total, i, it, (low + n_iter - 1 - i) * BN, row, seen, ramp,
                biases[2], scale, k_ring, v_ring, sizes, D, BN, S_LAYOUT, O_LAYOUT, STAGES, CAUSAL,
                LIMITS, EDGE, ALIBI, SOFTCAP, DTYPE,
            )  # fmt: skip
            it += 1
        if not SHARE:
            mbarrier.arrive(q_empty.index(place), count=1)
        s = (it - 1) % STAGES
        mbarrier.wait(v_full.index(s), ((it - 1) // STAGES) & 1)
        acc = warpgroup_mma(p16, v_smem.index(s).reshape([BN, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if LIMITS:
            it = pass_by(before, it, k_ring, v_ring, STAGES)

        total = whole_total(total, ROW)
        store_lse(lse_ptr, peak, total, ramp, head, row, T, scale, ROW, ALIBI)
        acc = acc * gl.convert_layout(1.0 / total, ROW_O)[:, None]
        store_out(out_desc, out_smem, acc, head, row, H, W, D)
        if SHARE:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(place), count=1)
        turn += 1
        position = following(turn, ticket)
    tma.store_wait(0)


@gluon.jit
def _work(
    results, biases, scale, rings, out_smem, sizes, limits, ends,
    W: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr, EDGE: gl.constexpr,
    SKIP: gl.constexpr, HALF: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr, SHARE: gl.constexpr, PLACES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """A consumer, of either kind."""
    if CHAINED:
        chained_consumer(
            results, biases, scale, rings, out_smem, sizes, W, D, CONSUMERS, BN, STAGES, EDGE,
            SOFTCAP, SINKS,
        )  # fmt: skip
    else:
        _consumer(
            results, biases, scale, rings, out_smem, sizes, limits, ends, W, D, CONSUMERS, BN,
            STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP, SINKS, SHARE, PLACES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["before", "after", "H", "T", "S", "n_heads", "n_tiles", "chunk"])
def attention_fwd_kernel(
    q_desc, k_desc, v_desc, out_desc,  # [B, T or S, H or H_kv, D], blocks [1, rows, 1, D]
    lse_ptr,  # [B, H, T] fp32, natural log
    slopes_ptr,  # [H] fp32
    sinks_ptr,  # [H]
    bounds_ptr,  # [B, 2, T] int32: where each token's document starts and ends
    counter_ptr,  # [1] int32, zero before and after; not read if CHAINED
    scale,  # of the scores, in log2 units; 1 with a soft cap
    cap,  # in log2 units
    inner,  # scale / cap: what the products are multiplied by before tanh
    before, after,  # the window
    H, T, S,
    n_heads,  # B * H
    n_tiles,  # of a head
    chunk,  # heads whose tiles stand together
    D: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,  # and nothing else: no window, no documents
    LIMITS: gl.constexpr,  # see masks.py
    EDGE: gl.constexpr,  # key tiles at the end of a row that may need the mask
    HALF: gl.constexpr,  # see first_scores of forward_parts.py
    SKIP: gl.constexpr,  # key tiles may be of no use to some warpgroups
    ALIBI: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    SHARE: gl.constexpr,  # out leaves through the place of Q
    CHAINED: gl.constexpr,  # tiles of equal length go through in turn, without a gap between them
):  # fmt: skip
    """out and lse of the tiles this program gets; one launch has at most one program per SM."""
    DTYPE: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLACES: gl.constexpr = 1 if SHARE else 2  # of Q
    q_smem = gl.allocate_shared_memory(DTYPE, [PLACES * CONSUMERS, 1, 64, 1, D], q_desc.layout)
    out_smem = q_smem
    if not SHARE:
        out_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 64, 1, D], out_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BN, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BN, 1, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [PLACES * CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [PLACES * CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ends = room_for_ends(1, CONSUMERS, LIMITS)
    slots = gl.allocate_shared_memory(gl.int32, [1, 1], FLAT)
    ticket_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    ticket_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(PLACES * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    mbarrier.init(ticket_full.index(0), count=1)
    mbarrier.init(ticket_empty.index(0), count=CONSUMERS)

    rings = (
        (q_smem, q_full, q_empty),
        (k_smem, k_full, kv_empty),
        (v_smem, v_full),
        (slots, ticket_full, ticket_empty),
    )
    sources = (q_desc, k_desc, v_desc)
    results = (out_desc, lse_ptr)
    biases = (slopes_ptr, sinks_ptr, (cap, inner))
    limits = (before, after, bounds_ptr)
    sizes = (H, T, S, n_heads, n_tiles, chunk)
    # registers of a thread at the end of each list: 65,536 in all
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_work, (results, biases, scale, rings, out_smem, sizes, limits, ends, 0, D,
                         CONSUMERS, BN, STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP,
                         SINKS, SHARE, PLACES, CHAINED)),
            (_work, (results, biases, scale, rings, out_smem, sizes, limits, ends, 1, D,
                         CONSUMERS, BN, STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP,
                         SINKS, SHARE, PLACES, CHAINED)),
            (_producer, (sources, rings, counter_ptr, sizes, limits, ends,
                         GROUP, CONSUMERS, BN, STAGES, CAUSAL, LIMITS, PLACES, CHAINED)),
        ], [4, 1], [240, 24])
    else:
        gl.warp_specialize([
            (_work, (results, biases, scale, rings, out_smem, sizes, limits, ends, 0, D,
                         CONSUMERS, BN, STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP,
                         SINKS, SHARE, PLACES, CHAINED)),
            (_work, (results, biases, scale, rings, out_smem, sizes, limits, ends, 1, D,
                         CONSUMERS, BN, STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP,
                         SINKS, SHARE, PLACES, CHAINED)),
            (_work, (results, biases, scale, rings, out_smem, sizes, limits, ends, 2, D,
                         CONSUMERS, BN, STAGES, CAUSAL, LIMITS, EDGE, SKIP, HALF, ALIBI, SOFTCAP,
                         SINKS, SHARE, PLACES, CHAINED)),
            (_producer, (sources, rings, counter_ptr, sizes, limits, ends,
                         GROUP, CONSUMERS, BN, STAGES, CAUSAL, LIMITS, PLACES, CHAINED)),
        ], [4, 4, 1], [160, 160, 24])
    # fmt: on
