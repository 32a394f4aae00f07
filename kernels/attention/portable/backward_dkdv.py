"""Attention, backward, dK and dV: one program owns BN keys and walks the queries that see them.

Dims: B batch, T queries, S keys, H heads, D head size of Q and K, DV of V, BD and BDV the same
padded to a power of two, BM / BN rows of a query / key tile. Maths: backward.py.
"""

import triton
import triton.language as tl

from kernels.attention.portable.extras import bias_scores, finite_level, kept, may_be_seen
from kernels.attention.portable.score import (
    LOG2_E,
    RAMP,
    load_rows,
    load_tile,
    log2_scores,
    ramp_level,
    seen_range,
)


@triton.jit
def walk_queries(
    dk, dv, k, v,  # [BN, BD] dk and k, [BN, BDV] dv and v; dk and dv fp32
    q_src, d_out_src, lse_base, delta_base, q_at, d_out_at, b, h, stride_qt, stride_dot,
    cols, first_col, first_seen, last_seen,  # [BN] key places, the first, the rows that see each
    begin, end, T, shift, scale, cap, slope,
    extras,  # of bias, key mask and dropout; see the kernel
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the query tiles of [begin, end) of one head give them.

    Scores are computed transposed, [BN, BM]: P^T and dS^T are then left operands of the products
    for dV and dK straight out of registers.
    """
    S, bias, stride_bt, key_seen, seed, bh, keep_from, keep_scale = extras
    lanes = tl.arange(0, BM)
    ramp = slope * tl.arange(0, BN).to(tl.float32)
    if not TMA:
        q_src += begin.to(tl.int64) * stride_qt
        d_out_src += begin.to(tl.int64) * stride_dot
    for start in tl.range(begin, end, BM):
        rows = start + lanes
        q = load_tile(q_src, q_at, b, start, h, T, BM, D, BD, MASKED, TMA)  # [BM, BD]
        d_out = load_tile(
            d_out_src, d_out_at, b, start, h, T, BM, DV, BDV, MASKED, TMA
        )  # [BM, BDV]
        if MASKED:
            level = tl.load(lse_base + rows, mask=rows < T, other=0.0) * LOG2_E
            delta = tl.load(delta_base + rows, mask=rows < T, other=0.0)
        else:
            level = tl.load(lse_base + rows) * LOG2_E
            delta = tl.load(delta_base + rows)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
        factor = scale
        if ALIBI or SOFTCAP or BIAS:
            place = rows + shift
            s, bent = log2_scores(
                s, place[None, :], cols[:, None], ramp[:, None], scale, cap, slope, ALIBI, SOFTCAP
            )
            factor = 1.0
        if ALIBI == RAMP:
            level -= ramp_level(first_col, rows + shift, slope)
        if BIAS:
            level = finite_level(level)
            s += bias_scores(bias, stride_bt, rows[None, :], cols[:, None], T, S, BIAS, True)
        p = tl.exp2(s * factor - level[None, :])  # [BN, BM]
        if MASKED:
            seen = (rows[None, :] >= first_seen[:, None]) & (rows[None, :] <= last_seen[:, None])
            p = tl.where(seen, p, 0.0)
        if KEY_MASK:
            p = tl.where(key_seen[:, None], p, 0.0)
        used = p
        if DROPOUT:
            keep = kept(seed, rows[None, :], cols[:, None], bh, keep_from)
            used = tl.where(keep, p, 0.0)
        dv = tl.dot(used.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")  # [BN, BM]
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - bent * bent)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if not TMA:
            q_src += BM * stride_qt
            d_out_src += BM * stride_dot
    return dk, dv


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,  # q and d_out are descriptors with TMA
    dk_ptr, dv_ptr,  # contiguous
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
    DROPOUT: tl.constexpr,
    EDGE: tl.constexpr,  # the last query tile of some key tile needs a mask
    TMA: tl.constexpr,
):  # fmt: skip
    """One program owns BN keys of one kv head and walks the queries of its GROUP heads."""
    n_tiles, H_kv = tl.cdiv(S, BN), H // GROUP
    tile, bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    b, h_kv = bh // H_kv, bh % H_kv
    b_far, h_far = b.to(tl.int64), h_kv.to(tl.int64)
    lanes, query_lanes = tl.arange(0, BN), tl.arange(0, BM)
    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    cols = tile * BN + lanes

    far = (tile * BN).to(tl.int64)
    k_base = k_ptr + b_far * stride_kb + h_far * stride_kh + far * stride_ks
    v_base = v_ptr + b_far * stride_vb + h_far * stride_vh + far * stride_vs
    k_at = lanes[:, None] * stride_ks + dims[None, :]
    v_at = lanes[:, None] * stride_vs + dims_v[None, :]
    k = load_rows(k_base, k_at, cols, dims, S, D, BD, True)  # [BN, BD]
    v = load_rows(v_base, v_at, cols, dims_v, S, DV, BDV, True)  # [BN, BDV]
    q_at = query_lanes[:, None] * stride_qt + dims[None, :]
    d_out_at = query_lanes[:, None] * stride_dot + dims_v[None, :]
    bounds = bounds_ptr
    if DOCUMENTS:
        bounds += b_far * 2 * T

    # seen from a key, the sides of the window change places: rows in [col - after, col + before]
    shift = S - T
    first_col, last_col = tile * BN, tl.minimum(tile * BN + BN, S) - 1
    first_a, last_a = seen_range(
        first_col, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
    )
    first_z, last_z = seen_range(
        last_col, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
    )
    first_seen, last_seen = seen_range(
        cols, S, -shift, after, before, T, bounds, AFTER, BEFORE, DOCUMENTS
    )
    begin, end = first_a // BM * BM, last_z + 1
    full_begin = (first_z + BM - 1) // BM * BM
    full_end = tl.maximum(last_a + 1, 0) // BM * BM
    key_seen, seed = 0, 0
    if KEY_MASK:
        key_seen = may_be_seen(key_mask_ptr + b_far * S, cols, S, True)
        first_key, last_key = tl.load(key_range_ptr + 2 * b), tl.load(key_range_ptr + 2 * b + 1)
        if first_col > last_key or last_col < first_key:  # no key of this tile may be seen
            end *= 0
            full_end *= 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    near_end, far_begin = tl.minimum(full_begin, end), tl.maximum(full_begin, full_end)

    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for member in range(GROUP):
        h = h_kv * GROUP + member
        q_src, d_out_src = q_ptr, d_out_ptr
        if not TMA:
            q_src += b_far * stride_qb + h.to(tl.int64) * stride_qh
            d_out_src += b_far * stride_dob + h.to(tl.int64) * stride_doh
        lse_base, delta_base = lse_ptr + (b_far * H + h) * T, delta_ptr + (b_far * H + h) * T
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + h) * LOG2_E
        bias = 0
        if BIAS:
            bias = bias_ptr + b_far * stride_bb + h.to(tl.int64) * stride_bh
        extras = (S, bias, stride_bt, key_seen, seed, b * H + h, keep_from, keep_scale)
        if AFTER or DOCUMENTS:
            dk, dv = walk_queries(
                dk, dv, k, v, q_src, d_out_src, lse_base, delta_base, q_at, d_out_at, b, h,
                stride_qt, stride_dot, cols, first_col, first_seen, last_seen, begin, near_end,
                T, shift, scale, cap, slope, extras, D, BD, DV, BDV, BM, BN,
                ALIBI, SOFTCAP, BIAS, KEY_MASK, DROPOUT, True, TMA,
            )  # fmt: skip
        dk, dv = walk_queries(
            dk, dv, k, v, q_src, d_out_src, lse_base, delta_base, q_at, d_out_at, b, h,
            stride_qt, stride_dot, cols, first_col, first_seen, last_seen, full_begin, full_end,
            T, shift, scale, cap, slope, extras, D, BD, DV, BDV, BM, BN,
            ALIBI, SOFTCAP, BIAS, KEY_MASK, DROPOUT, False, TMA,
        )  # fmt: skip
        if EDGE:
            dk, dv = walk_queries(
                dk, dv, k, v, q_src, d_out_src, lse_base, delta_base, q_at, d_out_at, b, h,
                stride_qt, stride_dot, cols, first_col, first_seen, last_seen, far_begin, end,
                T, shift, scale, cap, slope, extras, D, BD, DV, BDV, BM, BN,
                ALIBI, SOFTCAP, BIAS, KEY_MASK, DROPOUT, True, TMA,
            )  # fmt: skip

    if DROPOUT:
        dv *= keep_scale
    head = (b_far * S + far) * H_kv + h_kv
    dk_at = head * D + lanes[:, None] * (H_kv * D) + dims[None, :]
    dv_at = head * DV + lanes[:, None] * (H_kv * DV) + dims_v[None, :]
    dk_mask = (cols[:, None] < S) & (dims[None, :] < D)
    dv_mask = (cols[:, None] < S) & (dims_v[None, :] < DV)
    tl.store(dk_ptr + dk_at, (dk * out_scale).to(dk_ptr.dtype.element_ty), mask=dk_mask)
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)
