"""Attention, backward: delta, then dK and dV per key tile, then dQ per query tile.

Dims: B batch, T queries, S keys, H heads, D head size of Q and K, DV of V, BD and BDV the same
padded to a power of two, BM / BN rows of a query / key tile. With P = softmax(S), S = scale Q K^T:

    dV = P^T dO        dP = dO V^T        delta = rowsum(O * dO) - dLSE
    dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

Dropout, keep being 0 or 1 / (1 - dropout), makes dV = (keep P)^T dO and dP = keep * (dO V^T).
P is recomputed from lse. Each output tile is owned by one program, grouped heads included, so
nothing is added atomically and repeats are bit-identical; the price is 7 matrix products where
a fused kernel needs 5. README.md has what such a kernel measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.portable.backward_dbias import attention_bwd_dbias_kernel
from kernels.attention.portable.backward_dkdv import attention_bwd_dkdv_kernel
from kernels.attention.portable.backward_dq import attention_bwd_dq_kernel
from kernels.attention.portable.launch import Features, on_device, options, sources
from kernels.attention.portable.score import load_rows
from kernels.attention.tiles import Tiles

DELTA_ROWS = 64  # rows of a program of the delta kernel; it only reads, any size will do


@triton.jit
def attention_bwd_delta_kernel(
    out_ptr, d_out_ptr, d_lse_ptr, delta_ptr,  # [B, T, H, DV] twice, [B, H, T] twice
    stride_dob, stride_dot, stride_doh, H, T,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * d_out) - d_lse: all that the softmax's normalisation adds to dS."""
    n_tiles = tl.cdiv(T, BM)
    tile, bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    lanes, dims = tl.arange(0, BM), tl.arange(0, BDV)
    rows = tile * BM + lanes
    out_base = out_ptr + ((b * T + tile * BM) * H + h) * DV
    out_at = lanes[:, None] * (H * DV) + dims[None, :]
    d_out_base = d_out_ptr + b * stride_dob + h * stride_doh
    d_out_base += (tile * BM).to(tl.int64) * stride_dot
    d_out_at = lanes[:, None] * stride_dot + dims[None, :]
    out = load_rows(out_base, out_at, rows, dims, T, DV, BDV, True).to(tl.float32)
    d_out = load_rows(d_out_base, d_out_at, rows, dims, T, DV, BDV, True).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    at = (b * H + h) * T + rows
    if WITH_LSE:
        delta -= tl.load(d_lse_ptr + at, mask=rows < T, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < T)


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    features: Features,
    *,
    bias_gradient: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, d_sinks where there are sinks, and d_bias where asked for; all contiguous.

    Args:
        d_out: [B, T, H, Dv]; copied only if its last dimension is not contiguous.
        d_lse: [B, H, T], or None.
        tiles: overrides the choice of tiles.py; for sweeps.
    """
    B, T, H, _ = q.shape
    S, H_kv = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    bias = features.bias if bias_gradient else None
    if q.numel() == 0 or k.numel() == 0:
        d_sinks, d_bias = (
            None if x is None else torch.zeros_like(x) for x in (features.sinks, bias)
        )
        return dq.zero_(), dk.zero_(), dv.zero_(), d_sinks, d_bias
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    out, lse = out.contiguous(), lse.contiguous()  # as every forward leaves them: no copy
    tiles = tiles or features.tiles(q, v)
    delta = torch.empty_like(lse)
    strides = [n for x in (q, k, v, d_out) for n in x.stride()[:3]]
    numbers = [features.score_scale, features.scale, features.cap]
    numbers += [features.before, features.after, H, T, S, *features.extras()]
    optional = [features.alibi_slopes, features.bounds]
    common = {"GROUP": H // H_kv, **features.switches(q, v)}
    with on_device(q):
        attention_bwd_delta_kernel[(triton.cdiv(T, DELTA_ROWS) * B * H,)](
            out, d_out, None if d_lse is None else d_lse.contiguous(), delta,
            *d_out.stride()[:3], H, T,
            DV=common["DV"], BDV=common["BDV"], BM=DELTA_ROWS, WITH_LSE=d_lse is not None,
        )  # fmt: skip
        tile = tiles.dkdv
        (q_src, d_out_src), tma = sources((q, d_out), tile, tile.queries)
        attention_bwd_dkdv_kernel[(triton.cdiv(S, tile.keys) * B * H_kv,)](
            q_src, k, v, d_out_src, dk, dv, lse, delta, *optional, *strides, *numbers,
            EDGE=features.has_far_edge(T, tile.queries), TMA=tma, **common, **options(tile),
        )  # fmt: skip
        tile = tiles.dq
        (k_src, v_src), tma = sources((k, v), tile, tile.keys)
        attention_bwd_dq_kernel[(triton.cdiv(T, tile.queries) * B * H,)](
            q, k_src, v_src, d_out, dq, lse, delta, *optional, *strides, *numbers,
            EDGE=features.has_edge(S, tile.keys), TMA=tma, **common, **options(tile),
        )  # fmt: skip
        d_bias = None
        if bias is not None:
            d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
            own_b, own_h, own_t, _ = bias.shape
            assert tiles.dbias is not None, "these tiles are for calls without a bias"
            tile = tiles.dbias
            rows = triton.cdiv(T, tile.queries) if own_t > 1 else 1
            attention_bwd_dbias_kernel[(triton.cdiv(S, tile.keys) * rows * own_b * own_h,)](
                q, k, v, d_out, d_bias, lse, delta, *optional, *strides, *numbers,
                own_h, B // own_b, H // own_h, **common, **options(tile),
            )  # fmt: skip
    return dq, dk, dv, _sink_gradient(features.sinks, lse, delta), d_bias


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's value is zero, so dP is too: what is left is its probability times -delta."""
    if sinks is None:
        return None
    p = torch.exp(sinks.float()[:, None] - lse)  # [B, H, T]
    return -(p * delta).sum((0, 2)).to(sinks.dtype)
