"""Attention, forward: one program owns BM query rows of one head and walks the keys they see.

Dims: B batch, T queries, S keys, H heads, D head size of Q and K, DV of V, BD and BDV the same
padded to a power of two, BM / BN rows of a query / key tile. Maths: Dao 2023, arXiv:2307.08691,
Algorithm 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.portable.extras import bias_scores, kept, may_be_seen
from kernels.attention.portable.launch import Features, on_device, options, sources
from kernels.attention.portable.score import (
    LN_2,
    LOG2_E,
    RAMP,
    key_tiles,
    load_rows,
    load_tile,
    log2_scores,
    ramp_level,
    seen_range,
)
from kernels.attention.tiles import Tile


@triton.jit
def walk_keys(
    acc, total, peak,  # [BM, BDV], [BM], [BM] fp32: the running softmax
    q, k_src, v_src, k_at, v_at, b, h_kv, stride_ks, stride_vs,
    place, first_seen, last_seen,  # [BM] of each query row
    begin, end, S, scale, cap, slope,
    extras,  # of bias, key mask and dropout; see the kernel
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Absorb the key tiles of [begin, end), a multiple of BN each, into the running softmax."""
    rows, T, bias, stride_bt, key_mask, seed, bh, keep_from = extras
    lanes = tl.arange(0, BN)
    ramp = slope * lanes.to(tl.float32)
    if not TMA:  # the pointer walks, so offsets in a tile stay int32 whatever S * stride is
        k_src += begin.to(tl.int64) * stride_ks
        v_src += begin.to(tl.int64) * stride_vs
    for start in tl.range(begin, end, BN):
        cols = start + lanes
        k = load_tile(k_src, k_at, b, start, h_kv, S, BN, D, BD, MASKED, TMA)  # [BN, BD]
        v = load_tile(v_src, v_at, b, start, h_kv, S, BN, DV, BDV, MASKED, TMA)  # [BN, BDV]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        factor = scale
        level = tl.zeros_like(peak)
        if ALIBI or SOFTCAP or BIAS:
            s, _ = log2_scores(
                s, place[:, None], cols[None, :], ramp[None, :], scale, cap, slope, ALIBI, SOFTCAP
            )
            factor = 1.0
        if ALIBI == RAMP:
            level = ramp_level(start, place, slope)
        if BIAS:
            s += bias_scores(bias, stride_bt, rows[:, None], cols[None, :], T, S, BIAS, MASKED)
        if KEY_MASK:
            s = tl.where(may_be_seen(key_mask, cols, S, MASKED)[None, :], s, float("-inf"))
        if MASKED:
            seen = cols[None, :] <= last_seen[:, None]
            if LEFT:
                seen = seen & (cols[None, :] >= first_seen[:, None])
            s = tl.where(seen, s, float("-inf"))
        # the maximum is taken before scaling, so that scale and shift are one FMA per element
        new_peak = tl.maximum(peak, tl.max(s, 1) * factor + level)
        anchor = new_peak
        if MASKED or KEY_MASK or BIAS:  # a row that has seen nothing yet: -inf - -inf would be NaN
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - anchor)
        p = tl.exp2(s * factor - (anchor - level)[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if DROPOUT:
            p = tl.where(kept(seed, rows[:, None], cols[None, :], bh, keep_from), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
        if not TMA:
            k_src += BN * stride_ks
            v_src += BN * stride_vs
    return acc, total, peak


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_src, v_src,  # [B, T, H, D], [B, S, H_kv, D], [B, S, H_kv, DV]; the latter two
    # descriptors with TMA
    out_ptr, lse_ptr,  # [B, T, H, DV] contiguous, [B, H, T] fp32
    slopes_ptr, sinks_ptr, bounds_ptr,  # [H] fp32, [H], [B, 2, T] int32; None when unused
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    scale,  # to log2 units; with SOFTCAP scale / softcap, and cap = softcap in log2 units
    cap, before, after, H, T, S,
    bias_ptr, stride_bb, stride_bh, stride_bt,  # strides of 0 along what the bias lacks
    key_mask_ptr, key_range_ptr,  # [B, S] uint8, [B, 2] int32
    seed_ptr, keep_from, keep_scale,  # [1] int64; see extras.kept; 1 / (1 - dropout)
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    EDGE: tl.constexpr,  # the last key tile of some query tile needs a mask
    TMA: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(T, BM)
    tile, bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    if AFTER:  # long rows first: the short ones fill the gaps at the end of the grid
        tile = n_tiles - 1 - tile
    b, h = bh // H, bh % H
    b_far, h_far = b.to(tl.int64), h.to(tl.int64)  # offsets over whole tensors pass 2^31
    rows, lanes = tile * BM + tl.arange(0, BM), tl.arange(0, BN)
    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)

    q_base = q_ptr + b_far * stride_qb + h_far * stride_qh + (tile * BM).to(tl.int64) * stride_qt
    q_at = tl.arange(0, BM)[:, None] * stride_qt + dims[None, :]
    q = load_rows(q_base, q_at, rows, dims, T, D, BD, True)  # [BM, BD]
    if not TMA:
        k_src += b_far * stride_kb + (h_far // GROUP) * stride_kh
        v_src += b_far * stride_vb + (h_far // GROUP) * stride_vh
    k_at = lanes[:, None] * stride_ks + dims[None, :]
    v_at = lanes[:, None] * stride_vs + dims_v[None, :]

    acc = tl.zeros([BM, BDV], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    if SINKS:  # a sink is a score already in the softmax that adds nothing to out
        peak = tl.zeros([BM], tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        total += 1.0
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * LOG2_E
    bounds = bounds_ptr
    if DOCUMENTS:
        bounds += b_far * 2 * T

    bias, key_mask, key_range, seed = 0, 0, 0, 0
    if BIAS:
        bias = bias_ptr + b_far * stride_bb + h_far * stride_bh
    if KEY_MASK:
        key_mask = key_mask_ptr + b_far * S
        key_range = key_range_ptr + 2 * b
    if DROPOUT:
        seed = tl.load(seed_ptr)
    extras = (rows, T, bias, stride_bt, key_mask, seed, bh, keep_from)

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
    if LEFT:
        acc, total, peak = walk_keys(
            acc, total, peak, q, k_src, v_src, k_at, v_at, b, h // GROUP, stride_ks, stride_vs,
            place, first_seen, last_seen, begin, near_end, S, scale, cap, slope, extras,
            D, BD, DV, BDV, BN, ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, True, TMA,
        )  # fmt: skip
    acc, total, peak = walk_keys(
        acc, total, peak, q, k_src, v_src, k_at, v_at, b, h // GROUP, stride_ks, stride_vs,
        place, first_seen, last_seen, full_begin, full_end, S, scale, cap, slope, extras,
        D, BD, DV, BDV, BN, ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, False, TMA,
    )  # fmt: skip
    if EDGE:
        acc, total, peak = walk_keys(
            acc, total, peak, q, k_src, v_src, k_at, v_at, b, h // GROUP, stride_ks, stride_vs,
            place, first_seen, last_seen, far_begin, end, S, scale, cap, slope, extras,
            D, BD, DV, BDV, BN, ALIBI, SOFTCAP, LEFT, BIAS, KEY_MASK, DROPOUT, True, TMA,
        )  # fmt: skip

    blind = total == 0.0  # a row that sees no key: out 0, lse -inf
    out = acc / tl.where(blind, 1.0, total)[:, None]
    if DROPOUT:
        out *= keep_scale
    lse = tl.where(blind, float("-inf"), (peak + tl.log2(tl.where(blind, 1.0, total))) * LN_2)
    out_base = out_ptr + ((b_far * T + tile * BM) * H + h) * DV
    out_at = tl.arange(0, BM)[:, None] * (H * DV) + dims_v[None, :]
    mask = (rows[:, None] < T) & (dims_v[None, :] < DV)
    tl.store(out_base + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + (b_far * H + h) * T + rows, lse, mask=rows < T)


def forward(
    q: Tensor, k: Tensor, v: Tensor, features: Features, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] like q and lse [B, H, T] fp32, natural log.

    Args:
        q: [B, T, H, D]; k: [B, S, H_kv, D]; v: [B, S, H_kv, Dv].
        tile: overrides the choice of tiles.py; for sweeps.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    out = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = tile or features.tiles(q, v).forward
    with on_device(q):
        (k_src, v_src), tma = sources((k, v), tile, tile.keys)
        attention_fwd_kernel[(triton.cdiv(T, tile.queries) * B * H,)](
            q, k_src, v_src, out, lse, features.alibi_slopes, features.sinks, features.bounds,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            features.score_scale, features.cap, features.before, features.after, H, T, S,
            *features.extras(), GROUP=H // k.shape[2], SINKS=features.sinks is not None,
            EDGE=features.has_edge(S, tile.keys), TMA=tma,
            **features.switches(q, v), **options(tile),
        )  # fmt: skip
    return out, lse
