"""Decoding: a few query tokens against a long cache, the keys split over programs.

Dims: B batch, T query tokens, H heads, H_kv key/value heads, GROUP = H / H_kv, S room in the cache,
D / DV head size of keys / values, BD / BDV the same padded to powers of two, BM / BN rows of a
query / key tile. A query tile packs the GROUP heads that share a kv head with the T tokens, so
that K and V are read once for all of them. Splitting the keys: Dao et al. 2023, Flash-Decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.decode_tiles import DecodeTile, choose, choose_splits, query_rows
from kernels.attention.portable.launch import Features, on_device, padded
from kernels.attention.portable.score import LN_2, LOG2_E, tanh

MERGED_AT_ONCE = 2048  # partial results a merging program holds: 16 registers in each thread


@triton.jit
def load_cache(base, row_at, dims, inside, D: tl.constexpr, BD: tl.constexpr):
    """Rows of the cache, [BN, BD]; those outside come as zeros.

    Rows that nobody wrote may hold NaN, and a weight of 0 times NaN is NaN.
    """
    mask = inside[:, None]
    if D != BD:
        mask = mask & (dims[None, :] < D)
    return tl.load(base + row_at[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["before", "B", "T", "H_kv", "S", "n_splits"])
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, T, H, D]; [B, S, H_kv, D or DV], paged [n_pages, PAGE, H_kv, ..]
    lengths_ptr, table_ptr,  # [B] int32; [B, pages_per_sequence] int32, None when contiguous
    slopes_ptr, sinks_ptr,  # [H] fp32, [H]; None when unused
    # SPLIT: [n_splits, B, T, H, DV] fp32 and [n_splits, B, T, H] fp32 in log2 units, for merging;
    # else out [B, T, H, DV] and lse [B, H, T] fp32 in natural units
    out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_table,
    scale,  # to log2 units; with SOFTCAP scale / softcap, and cap = softcap in log2 units
    cap, before, B, T, H_kv, S, n_splits,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr,  # keys of a page; 0: contiguous
    BM: tl.constexpr, BN: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, BEFORE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # programs that start together read the same keys (row tiles), then neighbours (heads)
    n_tiles = tl.cdiv(T * GROUP, BM)
    tile, rest = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    h_kv, rest = rest % H_kv, rest // H_kv
    split, b = rest % n_splits, (rest // n_splits).to(tl.int64)
    h_far = h_kv.to(tl.int64)
    rows, lanes = tile * BM + tl.arange(0, BM), tl.arange(0, BN)
    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < T * GROUP
    t, h = rows // GROUP, h_kv * GROUP + rows % GROUP

    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), S)
    place = length - T + t  # where each row's token stands among the keys; < 0: it sees nothing
    # the tile sees the keys [begin, end); each of n_splits programs takes as many whole key tiles
    begin, end = 0, length - T + tl.minimum((tile * BM + BM - 1) // GROUP, T - 1) + 1
    if BEFORE:
        begin = tl.maximum(length - T + tile * BM // GROUP - before, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), n_splits), BN) * BN
    begin += split * share
    end = tl.minimum(begin + share, end)  # below begin when nothing is left for this program

    q_at = t.to(tl.int64) * stride_qt + h * stride_qh
    q = tl.load(
        q_ptr + b * stride_qb + q_at[:, None] + dims[None, :],
        mask=real[:, None] & (dims[None, :] < D), other=0.0,
    )  # [BM, BD]  # fmt: skip
    k_base, v_base = k_ptr + h_far * stride_kh, v_ptr + h_far * stride_vh
    if PAGE:
        table = table_ptr + b * stride_table
        # one tile ahead of its use: the load of a page's number then hides behind a tile's work
        next_page = tl.load(table + (begin + lanes) // PAGE, mask=begin + lanes < end, other=0)
    else:
        k_base += b * stride_kb
        v_base += b * stride_vb

    acc = tl.zeros([BM, BDV], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    if SINKS:  # a score already in the softmax that adds nothing to out: once per row
        sink = tl.load(sinks_ptr + h, mask=real, other=0.0).to(tl.float32) * LOG2_E
        peak = tl.where(split == 0, sink, peak)
        total = tl.where(split == 0, total + 1.0, total)
    if ALIBI:
        slope = tl.load(slopes_ptr + h, mask=real, other=0.0) * LOG2_E

    for start in tl.range(begin, end, BN):
        cols = start + lanes
        inside = cols < end
        if PAGE:
            page, slot = next_page.to(tl.int64), (cols % PAGE).to(tl.int64)
            ahead = cols + BN
            next_page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
            k_at, v_at = page * stride_kb + slot * stride_ks, page * stride_vb + slot * stride_vs
        else:
            k_at, v_at = cols.to(tl.int64) * stride_ks, cols.to(tl.int64) * stride_vs
        k = load_cache(k_base, k_at, dims, inside, D, BD)  # [BN, BD]
        v = load_cache(v_base, v_at, dims_v, inside, DV, BDV)  # [BN, BDV]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BM, BN]
        if SOFTCAP:
            s = cap * tanh(s)
        if ALIBI:
            s += slope[:, None] * (cols[None, :] - place[:, None]).to(tl.float32)
        seen = inside[None, :] & (cols[None, :] <= place[:, None])
        if BEFORE:
            seen = seen & (cols[None, :] >= place[:, None] - before)
        s = tl.where(seen, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # a row that has seen nothing yet: -inf - -inf would be NaN
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - anchor)
        p = tl.exp2(s - anchor[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    out = acc / total[:, None]
    level = tl.where(blind, float("-inf"), peak + tl.log2(total))
    H = H_kv * GROUP
    first = b * T
    if SPLIT:
        first += split.to(tl.int64) * B * T
        tl.store(lse_ptr + (first + t) * H + h, level, mask=real)
        real = real & ~blind  # nobody reads what has no weight
    else:
        tl.store(lse_ptr + (b * H + h) * T + t, level * LN_2, mask=real)
    out_at = (((first + t) * H + h) * DV)[:, None] + dims_v[None, :]
    tl.store(
        out_ptr + out_at,
        out.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (dims_v[None, :] < DV),
    )


@triton.jit(do_not_specialize=["n_rows", "T", "H", "n_splits"])
def attention_decode_merge_kernel(
    parts_ptr, levels_ptr,  # [n_splits, B, T, H, DV] and [n_splits, B, T, H] fp32, log2 units
    out_ptr, lse_ptr,  # [B, T, H, DV], [B, H, T] fp32
    n_rows, T, H, n_splits,
    DV: tl.constexpr, BDV: tl.constexpr,
    SPLITS: tl.constexpr,  # n_splits padded to a power of two
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One row of out: the mean of its parts, weighted by what each split summed."""
    row = tl.program_id(0).to(tl.int64)  # of B * T * H
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BDV)
    level = tl.load(
        levels_ptr + splits.to(tl.int64) * n_rows + row,
        mask=splits < n_splits, other=float("-inf"),
    )  # fmt: skip
    peak = tl.max(level, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(level - anchor), 0)
    acc = tl.zeros([BDV], tl.float32)
    for start in tl.range(0, n_splits, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        at = some.to(tl.int64) * n_rows + row
        part_level = tl.load(levels_ptr + at, mask=some < n_splits, other=float("-inf"))
        weight = tl.exp2(part_level - anchor)  # [AT_ONCE]
        used = (weight > 0.0)[:, None] & (dims[None, :] < DV)
        part = tl.load(parts_ptr + at[:, None] * DV + dims[None, :], mask=used, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), (anchor + tl.log2(total)) * LN_2)
    h, t, b = row % H, row // H % T, row // H // T
    tl.store(lse_ptr + (b * H + h) * T + t, lse)
    tl.store(out_ptr + row * DV + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < DV)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    features: Features,
    *,
    tile: DecodeTile | None = None,
    n_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] like q and lse [B, H, T] fp32 (natural log), as `attention_decode` says.

    The grid depends on sizes alone, never on the lengths: a captured graph serves all of them.

    Args:
        tile, n_splits: override the choice of decode_tiles.py; for sweeps.
    """
    B, T, H, D = q.shape
    H_kv, DV = v_cache.shape[2:]
    page = 0 if page_table is None else k_cache.shape[1]
    S = k_cache.shape[1] if page_table is None else page * page_table.shape[1]
    out = torch.empty((B, T, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = H // H_kv
    rows = query_rows(T * group, q.dtype)
    tile = tile or choose(q.device, rows, D, DV, q.dtype)
    programs = triton.cdiv(T * group, rows) * H_kv * B
    if n_splits is None:
        keys = S if features.before < 0 else min(S, features.before + T)
        n_splits = choose_splits(q.device, tile, programs, keys, rows, D, DV, q.dtype)
    split = n_splits > 1
    parts, levels = out, lse
    if split:
        parts = torch.empty((n_splits, B, T, H, DV), dtype=torch.float32, device=q.device)
        levels = torch.empty((n_splits, B, T, H), dtype=torch.float32, device=q.device)
    with on_device(q):
        attention_decode_kernel[(programs * n_splits,)](
            q, k_cache, v_cache, lengths, page_table, features.alibi_slopes, features.sinks,
            parts, levels, *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
            0 if page_table is None else page_table.stride(0),
            features.score_scale, features.cap, features.before, B, T, H_kv, S, n_splits,
            D=D, BD=padded(D), DV=DV, BDV=padded(DV), GROUP=group, PAGE=page,
            BM=rows, BN=tile.keys, ALIBI=features.alibi_slopes is not None,
            SOFTCAP=features.softcap > 0, SINKS=features.sinks is not None,
            BEFORE=features.before >= 0, SPLIT=split,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if split:
            most = triton.next_power_of_2(n_splits)
            attention_decode_merge_kernel[(B * T * H,)](
                parts, levels, out, lse, B * T * H, T, H, n_splits,
                DV=DV, BDV=padded(DV), SPLITS=most,
                AT_ONCE=min(most, MERGED_AT_ONCE // padded(DV)), num_warps=4,
            )  # fmt: skip
    return out, lse
