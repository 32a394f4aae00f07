"""What decoding over a cache means, in plain PyTorch: the kernels are tested against this file.

Dims: B batch, T query tokens, S room in the cache, H heads, K = H_kv key/value heads, D / Dv head
size of keys / values.
"""

import torch
from torch import Tensor

from kernels.attention.problem import UNBOUNDED


def decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    before: int = UNBOUNDED,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scores, mask, softmax, weighted sum, all [T, S] scores in memory; arguments as decode.py's.

    Args:
        compute: dtype of every step; float64 makes the exact answer for tests, q's own dtype
            makes the eager one.

    Returns:
        out [B, T, H, Dv] in q's dtype (in `compute` when that is float64) and lse [B, H, T] in
        float32 (or float64).
    """
    if page_table is not None:
        # numbers of pages that no length reaches may be anything
        pages = page_table.long().clamp(0, k_cache.shape[0] - 1)
        k_cache, v_cache = (x[pages].flatten(1, 2) for x in (k_cache, v_cache))
    (B, T, H, D), (S, K, Dv) = q.shape, v_cache.shape[1:]
    lengths = lengths.clamp(0, S)
    cols = torch.arange(S, device=q.device)
    place = lengths[:, None] - T + torch.arange(T, device=q.device)  # [B, T]
    ahead = (cols - place[..., None])[:, None]  # [B, 1, T, S]
    inside = cols < lengths[:, None]  # [B, S]
    k, v = (x.to(compute).masked_fill(~inside[..., None, None], 0) for x in (k_cache, v_cache))
    grouped = q.to(compute).unflatten(2, (K, H // K)) * (D**-0.5 if scale is None else scale)
    s = torch.einsum("btkgd,bskd->bkgts", grouped, k).flatten(1, 2)  # [B, H, T, S]
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s + alibi_slopes.to(compute)[:, None, None] * ahead.to(compute)
    seen = ahead <= 0
    if before != UNBOUNDED:
        seen = seen & (ahead >= -before)
    s = s.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(compute)[None, :, None, None].expand(B, H, T, 1)], -1)
    lse = torch.logsumexp(s, -1)
    blind = lse == float("-inf")
    p = torch.exp(s - lse.masked_fill(blind, 0.0)[..., None])[..., :S]  # a blind row: all 0
    out = torch.einsum("bkgts,bskd->btkgd", p.unflatten(1, (K, H // K)), v)
    wide = compute == torch.float64
    out = out.reshape(B, T, H, Dv).to(compute if wide else q.dtype)
    return out, lse.to(compute if wide else torch.float32)
