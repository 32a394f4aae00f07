"""What both consumers of the forward share: the step from key tile to key tile, and a tile's ends.

Dims: BM = 64 CONSUMERS queries of a tile, of which a warpgroup has 64; BN keys of a tile.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.runs import keep_run
from kernels.attention.hopper.shim import tma_store
from kernels.attention.hopper.softmax import (
    LN_2,
    MASKED,
    MASKED_BITS,
    SUMS,
    bias_scores,
    softmax_step,
)


@gluon.jit
def limit_of(row, S, past, ROW: gl.constexpr, CAUSAL: gl.constexpr):
    """[64], behind the last key that each row from `row` on sees under a plain mask."""
    limit = gl.full([64], 0, gl.int32, ROW) + S
    if CAUSAL:
        limit = gl.minimum(limit, row + gl.arange(0, 64, ROW) + (past + 1))
    return limit


@gluon.constexpr_function
def _keys_of(BN, HALF, W):
    """Of the first key tile, how many the warpgroup needs."""
    return BN // 2 if HALF and W == 0 else BN


@gluon.jit
def first_scores(q, k, W: gl.constexpr, BN: gl.constexpr, HALF: gl.constexpr):
    """Issue Q K' of a tile's first keys k [BN, D]. HALF: these end with what row 127 sees, so
    warpgroup 0, rows 0 to 63, needs the first half of them only."""
    KEYS: gl.constexpr = _keys_of(BN, HALF, W)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    nothing = gl.zeros([64, KEYS], gl.float32, LAYOUT)
    if KEYS < BN:
        k = k.slice(0, KEYS, 0)
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def first_softmax(
    qk, head, row, key, seen, biases, scale, sizes, W: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr, LIMITS: gl.constexpr, EDGE: gl.constexpr, HALF: gl.constexpr,
    ALIBI: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """P [64, BN], peak, total and ALiBi's ramp after the first key tile of a tile of rows.

    qk: of first_scores, waited for.
    seen: for LIMITS (first, behind the last key of each row; keys that all 64 rows see).
    """
    slopes_ptr, sinks_ptr, bend = biases
    H, T, S, _n_heads, _n_tiles, _chunk = sizes
    KEYS: gl.constexpr = _keys_of(BN, HALF, W)
    CLEAR: gl.constexpr = BN // 2 if HALF and W == 1 else 0  # keys that all rows see
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    rows = row + gl.arange(0, 64, ROW)
    ramp = 0.0
    if ALIBI:
        ramp = gl.load(slopes_ptr + head % H) / (scale * LN_2)  # in the unit of the scores
    peak = gl.full([64], MASKED, gl.float32, ROW)
    total = gl.full([64, 4], 0.0, gl.float32, SUMS)
    if SINKS:  # one more score, whose value is zero
        sink = gl.load(sinks_ptr + head % H).to(gl.float32) / (scale * LN_2)
        peak = gl.full([64], 0.0, gl.float32, ROW) + sink
        if ALIBI:
            peak += ramp * (rows - row).to(gl.float32)
        first = gl.arange(0, 4, gl.SliceLayout(0, SUMS)) == 0
        total += gl.where(first, 1.0, 0.0)[None, :]
    keys = key + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    qk = bias_scores(qk, keys, row + (S - T), ramp, bend, SOFTCAP, ALIBI)
    if LIMITS:
        qk = keep_run(qk, seen[0] - key, seen[1] - key, MASKED_BITS, True, True)
    elif EDGE > 0:
        limit = limit_of(row, S, S - T, ROW, CAUSAL) - key
        qk = keep_run(qk, limit, limit, MASKED_BITS, False, True, CLEAR)
    p, peak, total, _ = softmax_step(qk, peak, total, scale)
    p = p.to(DTYPE)
    if KEYS < BN:  # zeros for the other half: all later steps are alike
        FULL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
        p = gl.join(p, gl.zeros([64, KEYS], DTYPE, LAYOUT)).permute((0, 2, 1)).reshape([64, BN])
        p = gl.convert_layout(p, FULL, assert_trivial=True)
        peak = gl.convert_layout(peak, gl.SliceLayout(1, FULL), assert_trivial=True)
    return p, peak, total, ramp


@gluon.jit
def key_step(
    q, p16, acc, peak, total, i, it, key, row, seen, ramp, bend, scale, k_ring, v_ring, sizes,
    D: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr, EDGE: gl.constexpr,
    ALIBI: gl.constexpr, SOFTCAP: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Key tile i of a tile of rows, number `it` of all, that starts at `key`: P V of the tile
    before beside this one's scores. Its P, and acc, peak and total scaled alike."""
    k_smem, k_full, kv_empty = k_ring
    v_smem, v_full = v_ring
    _H, T, S, _n_heads, _n_tiles, _chunk = sizes
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    nothing = gl.zeros([64, BN], gl.float32, LAYOUT)
    s = it % STAGES
    before = (it - 1) % STAGES
    mbarrier.wait(k_full.index(s), (it // STAGES) & 1)
    k = k_smem.index(s).reshape([BN, D]).permute((1, 0))
    qk = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
    v = v_smem.index(before).reshape([BN, D])
    acc = warpgroup_mma(p16, v, acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=(qk,))
    keys = key + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    qk = bias_scores(qk, keys, row + (S - T), ramp, bend, SOFTCAP, ALIBI)
    if LIMITS:
        first, limit, clear_from, clear_to = seen
        if (key < clear_from) | (key + (BN - 1) > clear_to):
            qk = keep_run(qk, first - key, limit - key, MASKED_BITS, True, True)
    elif EDGE > 1:
        if i < EDGE:
            limit = limit_of(row, S, S - T, ROW, CAUSAL) - key
            qk = keep_run(qk, limit, limit, MASKED_BITS, False, True)
    p, peak, total, shrink = softmax_step(qk, peak, total, scale)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(kv_empty.index(s), count=1)
    acc = acc * gl.convert_layout(shrink, ROW_O)[:, None]
    p16 = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    return p16, acc, peak, total


@gluon.jit
def pass_by(n, it, k_ring, v_ring, STAGES: gl.constexpr):
    """Let n key tiles go that only other rows of this tile see."""
    _, k_full, kv_empty = k_ring
    _, v_full = v_ring
    for _ in range(n):
        s = it % STAGES
        mbarrier.wait(k_full.index(s), (it // STAGES) & 1)
        mbarrier.wait(v_full.index(s), (it // STAGES) & 1)
        mbarrier.arrive(kv_empty.index(s), count=1)
        it += 1
    return it


@gluon.jit
def whole_total(total, ROW: gl.constexpr):
    """[64]: what the four threads of each row have."""
    return gl.convert_layout(gl.sum(total, 1), ROW, assert_trivial=True)


@gluon.jit
def store_lse(
    lse_ptr, peak, total, ramp, head, row, T, scale, ROW: gl.constexpr, ALIBI: gl.constexpr
):  # fmt: skip
    """lse of the 64 rows from `row` on."""
    rows = row + gl.arange(0, 64, ROW)
    lse = (peak * scale + gl.log2(total)) * LN_2
    if ALIBI:
        lse = lse - ramp * scale * LN_2 * (rows - row).to(gl.float32)
    gl.store(lse_ptr + head.to(gl.int64) * T + rows, lse, mask=rows < T)


@gluon.jit
def store_out(out_desc, out_smem, acc, head, row, H, W: gl.constexpr, D: gl.constexpr):
    """acc [64, D] leaves for out through its staging buffer."""
    tma.store_wait(0)  # the tile before has left it
    out_smem.index(W).reshape([64, D]).store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma_store(out_desc, [head // H, row, head % H, 0], out_smem.index(W))
