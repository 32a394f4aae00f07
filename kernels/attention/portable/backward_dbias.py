"""Attention, backward, d_bias: one program owns a tile of it and walks all that it is broadcast to.

dBias = dS = P * (dP - delta), summed over the batch rows, heads and queries that share a number.
The scores are computed once more for it, so nothing is added atomically and repeats are
bit-identical.

Dims: B batch, T queries, S keys, H heads, D head size of Q and K, DV of V, BD and BDV the same
padded to a power of two, BM / BN rows of a query / key tile. Maths: backward.py.
"""

import triton
import triton.language as tl

from kernels.attention.portable.extras import (
    PAIR_BIAS,
    bias_scores,
    finite_level,
    kept,
    may_be_seen,
)
from kernels.attention.portable.score import (
    LOG2_E,
    RAMP,
    load_rows,
    log2_scores,
    ramp_level,
    seen_range,
)


@triton.jit
def walk_queries(
    acc, k, v,  # [BM, BN] fp32, [BN, BD], [BN, BDV]
    q_base, d_out_base, lse_base, delta_base, q_at, d_out_at, stride_qt, stride_dot,
    cols, first_col, first_seen, last_seen,  # [BN] key places, the first, the rows that see each
    begin, end, T, shift, scale, cap, slope, extras,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to acc the dS of the query tiles of [begin, end) of one batch row and head."""
    S, bias, stride_bt, key_seen, seed, bh, keep_from, keep_scale = extras
    lanes, dims, dims_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    ramp = slope * tl.arange(0, BN).to(tl.float32)
    q_base += begin.to(tl.int64) * stride_qt
    d_out_base += begin.to(tl.int64) * stride_dot
    for start in tl.range(begin, end, BM):
        rows = start + lanes
        q = load_rows(q_base, q_at, rows, dims, T, D, BD, True)  # [BM, BD]
        d_out = load_rows(d_out_base, d_out_at, rows, dims_v, T, DV, BDV, True)  # [BM, BDV]
        level = tl.load(lse_base + rows, mask=rows < T, other=0.0) * LOG2_E
        delta = tl.load(delta_base + rows, mask=rows < T, other=0.0)
        level = finite_level(level)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        s, _ = log2_scores(
            s, (rows + shift)[:, None], cols[None, :], ramp[None, :], scale, cap, slope,
            ALIBI, SOFTCAP,
        )  # fmt: skip
        s += bias_scores(bias, stride_bt, rows[:, None], cols[None, :], T, S, BIAS, True)
        if ALIBI == RAMP:
            level -= ramp_level(first_col, rows + shift, slope)
        seen = (rows[:, None] >= first_seen[None, :]) & (rows[:, None] <= last_seen[None, :])
        if KEY_MASK:
            seen = seen & key_seen[None, :]
        p = tl.where(seen, tl.exp2(s - level[:, None]), 0.0)  # [BM, BN]
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")  # [BM, BN]
        if DROPOUT:
            keep = kept(seed, rows[:, None], cols[None, :], bh, keep_from)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        acc += p * (dp - delta[:, None])
        q_base += BM * stride_qt
        d_out_base += BM * stride_dot
    return acc


@triton.jit
def attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,
    d_bias_ptr,  # contiguous, in the shape of the bias
    lse_ptr, delta_ptr,  # [B, H, T] fp32
    slopes_ptr, bounds_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dob, stride_dot, stride_doh,
    scale, out_scale, cap, before, after, H, T, S,
    bias_ptr, stride_bb, stride_bh, stride_bt,  # see attention_fwd_kernel
    key_mask_ptr, key_range_ptr, seed_ptr, keep_from, keep_scale,
    own_heads, share_batches, share_heads,  # heads of the bias; what shares one row of it
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DOCUMENTS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program owns BN keys of one row of the bias, or with PAIR_BIAS of BM rows."""
    n_key_tiles, n_query_tiles = tl.cdiv(S, BN), tl.cdiv(T, BM)
    key_tile, own = tl.program_id(0) % n_key_tiles, tl.program_id(0) // n_key_tiles
    first_row, end_row = 0, T
    if BIAS == PAIR_BIAS:
        first_row = own % n_query_tiles * BM
        end_row = tl.minimum(first_row + BM, T)
        own = own // n_query_tiles
    own_b, own_h = own // own_heads, own % own_heads

    lanes, query_lanes = tl.arange(0, BN), tl.arange(0, BM)
    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    first_col = key_tile * BN
    last_col = tl.minimum(first_col + BN, S) - 1
    cols = first_col + lanes
    far = first_col.to(tl.int64)
    k_at = lanes[:, None] * stride_ks + dims[None, :]
    v_at = lanes[:, None] * stride_vs + dims_v[None, :]
    q_at = query_lanes[:, None] * stride_qt + dims[None, :]
    d_out_at = query_lanes[:, None] * stride_dot + dims_v[None, :]
    shift = S - T
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros([BM, BN], tl.float32)
    for member in range(share_batches * share_heads):
        b, h = own_b + member // share_heads, own_h + member % share_heads
        b_far, h_far = b.to(tl.int64), h.to(tl.int64)
        bounds = bounds_ptr
        if DOCUMENTS:
            bounds += b_far * 2 * T
        first_a, _ = seen_range(
            first_col, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
        )
        _, last_z = seen_range(
            last_col, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
        )
        first_seen, last_seen = seen_range(
            cols, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
        )
        begin = tl.maximum(first_a // BM * BM, first_row)
        end = tl.minimum(last_z + 1, end_row)
        key_seen = 0
        if KEY_MASK:
            key_seen = may_be_seen(key_mask_ptr + b_far * S, cols, S, True)
            first_key, last_key = tl.load(key_range_ptr + 2 * b), tl.load(key_range_ptr + 2 * b + 1)
            if first_col > last_key or last_col < first_key:
                end *= 0
        k_base = k_ptr + b_far * stride_kb + (h_far // GROUP) * stride_kh + far * stride_ks
        v_base = v_ptr + b_far * stride_vb + (h_far // GROUP) * stride_vh + far * stride_vs
        k = load_rows(k_base, k_at, cols, dims, S, D, BD, True)  # [BN, BD]
        v = load_rows(v_base, v_at, cols, dims_v, S, DV, BDV, True)  # [BN, BDV]
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + h) * LOG2_E
        bias = bias_ptr + b_far * stride_bb + h_far * stride_bh
        extras = (S, bias, stride_bt, key_seen, seed, b * H + h, keep_from, keep_scale)
        rows_of = (b_far * H + h) * T
        acc = walk_queries(
            acc, k, v, q_ptr + b_far * stride_qb + h_far * stride_qh,
            d_out_ptr + b_far * stride_dob + h_far * stride_doh,
            lse_ptr + rows_of, delta_ptr + rows_of, q_at, d_out_at, stride_qt, stride_dot,
            cols, first_col, first_seen, last_seen, begin, end, T, shift, scale, cap, slope,
            extras, D, BD, DV, BDV, BM, BN, ALIBI, SOFTCAP, BIAS, KEY_MASK, DROPOUT,
        )  # fmt: skip

    own_far = own.to(tl.int64)
    if BIAS == PAIR_BIAS:
        rows = first_row + query_lanes
        at = (own_far * T + rows)[:, None] * S + cols[None, :]
        mask = (rows[:, None] < T) & (cols[None, :] < S)
        tl.store(d_bias_ptr + at, acc.to(d_bias_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.sum(acc, 0)
        at = d_bias_ptr + own_far * S + cols
        tl.store(at, total.to(d_bias_ptr.dtype.element_ty), mask=cols < S)
