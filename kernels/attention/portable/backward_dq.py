"""Attention, backward, dQ: one program owns BM query rows and walks the keys, as the forward does.

Dims: B batch, T queries, S keys, H heads, D head size of Q and K, DV of V, BD and BDV the same
padded to a power of two, BM / BN rows of a query / key tile. Maths: backward.py.
"""

import triton
import triton.language as tl

from kernels.attention.portable.extras import bias_scores, finite_level, kept, may_be_seen
from kernels.attention.portable.score import (
    LOG2_E,
    RAMP,
    key_tiles,
    load_rows,
    load_tile,
    log2_scores,
    ramp_level,
    seen_range,
)


@triton.jit
def walk_keys(
    dq, q, d_out, level, delta,  # [BM, BD] twice, [BM, BDV], [BM] twice; level: lse, log2 units
    k_src, v_src, k_at, v_at, b, h_kv, stride_ks, stride_vs,
    place, first_seen, last_seen,  # [BM] of each query row
    begin, end, S, scale, cap, slope,
    extras,  # of bias, key mask and dropout; see the kernel
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dq what the key tiles of [begin, end) give it."""
    rows, T, bias, stride_bt, key_mask, seed, bh, keep_from, keep_scale = extras
    lanes = tl.arange(0, BN)
    ramp = slope * lanes.to(tl.float32)
    if not TMA:
        k_src += begin.to(tl.int64) * stride_ks
        v_src += begin.to(tl.int64) * stride_vs
    for start in tl.range(begin, end, BN):
        cols = start + lanes
        k = load_tile(k_src, k_at, b, start, h_kv, S, BN, D, BD, MASKED, TMA)  # [BN, BD]
        v = load_tile(v_src, v_at, b, start, h_kv, S, BN, DV, BDV, MASKED, TMA)  # [BN, BDV]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        factor = scale
        anchor = level
        if ALIBI or SOFTCAP or BIAS:
            s, bent = log2_scores(
                s, place[:, None], cols[None, :], ramp[None, :], scale, cap, slope, ALIBI, SOFTCAP
            )
            factor = 1.0
        if ALIBI == RAMP:
            anchor = level - ramp_level(start, place, slope)
        if BIAS:
            s += bias_scores(bias, stride_bt, rows[:, None], cols[None, :], T, S, BIAS, MASKED)
        p = tl.exp2(s * factor - anchor[:, None])  # [BM, BN]
        if MASKED:
            seen = cols[None, :] <= last_seen[:, None]
            if LEFT:
                seen = seen & (cols[None, :] >= first_seen[:, None])
            p = tl.where(seen, p, 0.0)
        if KEY_MASK:
            p = tl.where(may_be_seen(key_mask, cols, S, MASKED)[None, :], p, 0.0)
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")  # [BM, BN]
        if DROPOUT:
            keep = kept(seed, rows[:, None], cols[None, :], bh, keep_from)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - bent * bent)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if not TMA:
            k_src += BN * stride_ks
            v_src += BN * stride_vs
    return dq


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_src, v_src, d_out_ptr,  # k and v descriptors with TMA
    dq_ptr,  # [B, T, H, D] contiguous
    lse_ptr, delta_ptr,  # [B, H, T] fp32
    slopes_ptr, bounds_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dob, stride_dot, stride_doh,
    scale, out_scale, cap, before, after, H, T, S,
    bias_ptr, stride_bb, stride_bh, stride_bt,  # see attention_fwd_kernel
    key_mask_ptr, key_range_ptr, seed_ptr, keep_from, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DOCUMENTS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program owns BM query rows of one head and walks the keys, as the forward does."""
    n_tiles = tl.cdiv(T, BM)
    tile, bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    if AFTER:  # long rows first
        tile = n_tiles - 1 - tile
    b, h = bh // H, bh % H
    b_far, h_far = b.to(tl.int64), h.to(tl.int64)
    query_lanes, lanes = tl.arange(0, BM), tl.arange(0, BN)
    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    rows = tile * BM + query_lanes

    far = (tile * BM).to(tl.int64)
    q_at = query_lanes[:, None] * stride_qt + dims[None, :]
    q_base = q_ptr + b_far * stride_qb + h_far * stride_qh + far * stride_qt
    q = load_rows(q_base, q_at, rows, dims, T, D, BD, True)  # [BM, BD]
    d_out_at = query_lanes[:, None] * stride_dot + dims_v[None, :]
    d_out_base = d_out_ptr + b_far * stride_dob + h_far * stride_doh + far * stride_dot
    d_out = load_rows(d_out_base, d_out_at, rows, dims_v, T, DV, BDV, True)  # [BM, BDV]
    level = tl.load(lse_ptr + (b_far * H + h) * T + rows, mask=rows < T, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + (b_far * H + h) * T + rows, mask=rows < T, other=0.0)
    if not TMA:
        k_src += b_far * stride_kb + (h_far // GROUP) * stride_kh
        v_src += b_far * stride_vb + (h_far // GROUP) * stride_vh
    k_at = lanes[:, None] * stride_ks + dims[None, :]
    v_at = lanes[:, None] * stride_vs + dims_v[None, :]
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * LOG2_E
    bounds = bounds_ptr
    if DOCUMENTS:
        bounds += b_far * 2 * T

    bias, key_mask, key_range, seed = 0, 0, 0, 0
    if BIAS:
        bias = bias_ptr + b_far * stride_bb + h_far * stride_bh
        level = finite_level(level)
    if KEY_MASK:
        key_mask = key_mask_ptr + b_far * S
        key_range = key_range_ptr + 2 * b
    if DROPOUT:
        seed = tl.load(seed_ptr)
    extras = (rows, T, bias, stride_bt, key_mask, seed, bh, keep_from, keep_scale)

    LEFT: tl.constexpr = BEFORE or DOCUMENTS or KEY_MASK
    shift = S - T
    begin, end, full_begin, full_end = key_tiles(
        tile, T, S, before, after, bounds, key_range,
        BM, BN, BEFORE, AFTER, DOCUMENTS, KEY_MASK,
    )  # fmt: skip
    first_seen, last_seen = seen_range(
        rows, T, shift, before, after, S, bounds, BEFORE, AFTER, DOCUMENTS
    )
    near_end, far_begin = tl.minimum(full_begin, end), tl.maximum(full_begin, full_end)
    place = rows + shift
    dq = tl.zeros([BM, BD], tl.float32)
    if LEFT:
        dq = walk_keys(
            dq, q, d_out, level, delta, k_src, v_src, k_at, v_at, b, h // GROUP,
            stride_ks, stride_vs, place, first_seen, last_seen, begin, near_end,
            S, scale, cap, slope, extras, D, BD, DV, BDV, BN,
            ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, True, TMA,
        )  # fmt: skip
    dq = walk_keys(
        dq, q, d_out, level, delta, k_src, v_src, k_at, v_at, b, h // GROUP,
        stride_ks, stride_vs, place, first_seen, last_seen, full_begin, full_end,
        S, scale, cap, slope, extras, D, BD, DV, BDV, BN,
        ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, False, TMA,
    )  # fmt: skip
    if EDGE:
        dq = walk_keys(
            dq, q, d_out, level, delta, k_src, v_src, k_at, v_at, b, h // GROUP,
            stride_ks, stride_vs, place, first_seen, last_seen, far_begin, end,
            S, scale, cap, slope, extras, D, BD, DV, BDV, BN,
            ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, True, TMA,
        )  # fmt: skip

    at = ((b_far * T + far) * H + h) * D + query_lanes[:, None] * (H * D) + dims[None, :]
    mask = (rows[:, None] < T) & (dims[None, :] < D)
    tl.store(dq_ptr + at, (dq * out_scale).to(dq_ptr.dtype.element_ty), mask=mask)
