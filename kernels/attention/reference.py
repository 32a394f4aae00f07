"""What attention means, in plain PyTorch: every other backend is tested against this file.

Dims: B batch, T queries, S keys, H heads, K = H_kv key/value heads, G = H / K, D head size of
q and k, Dv of v.
"""

import torch
from torch import Tensor

from kernels.attention.dropout import keep_mask, seed_tensor
from kernels.attention.ranges import document_ids


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scores, mask, softmax, weighted sum, all [T, S] scores in memory.

    Args:
        q: [B, T, H, D]; k: [B, S, K, D]; v: [B, S, K, Dv]; the options are those of `attention`.
        compute: dtype of every step; float64 makes the exact answer for tests, q's own dtype
            makes the eager one.

    Returns:
        out [B, T, H, Dv] in q's dtype (in `compute` when that is wider than float32) and
        lse [B, H, T] in float32 (or `compute`), natural log, sinks included. A query that sees
        no key has out 0 and lse -inf.
    """
    B, T, H, D = q.shape
    S, K, Dv = v.shape[1:]
    wide = compute == torch.float64
    scale = D**-0.5 if scale is None else scale
    # [B, K, G, T, S]
    s = torch.einsum(
        "btkgd,bskd->bkgts", q.to(compute).view(B, T, K, H // K, D) * scale, k.to(compute)
    )
    s = s.reshape(B, H, T, S)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    # the queries are the last T of the S positions
    ahead = torch.arange(S, device=q.device) - torch.arange(T, device=q.device)[:, None] - (S - T)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(compute)[:, None, None] * ahead.abs().to(compute)

    if documents is not None:
        documents = document_ids(documents, B, T)
    seen = visible(ahead, causal, window, documents, key_mask)  # [B or 1, 1, T, S]
    if bias is not None:
        hidden = bias == float("-inf")
        s = s + bias.to(compute).masked_fill(hidden, 0.0)
        seen = seen & ~hidden  # [B or 1, H or 1, T, S]
    # a row of -inf alone would make softmax and its gradient NaN, so its scores become 0 instead
    # and its results are put in place at the end
    blind = ~seen.any(-1)  # [B or 1, H or 1, T]
    s = s.masked_fill(~seen & ~blind[..., None], float("-inf"))
    if sinks is not None:
        column = sinks.to(compute)[None, :, None, None].expand(B, H, T, 1)
        s = torch.where(blind[..., None], float("-inf"), s)  # finite again through the sink
        s = torch.cat([s, column], -1)
        blind = torch.zeros_like(blind)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None])[..., :S].masked_fill(blind[..., None], 0.0)
    if dropout > 0:
        kept = keep_mask(seed_tensor(dropout_seed, q.device), dropout, (B, H, T, S))
        p = p * kept / (1 - dropout)
    out = torch.einsum("bkgts,bskd->btkgd", p.view(B, K, H // K, T, S), v.to(compute))
    lse = lse.masked_fill(blind, float("-inf"))
    return (
        out.reshape(B, T, H, Dv).to(compute if wide else q.dtype),
        lse.to(compute if wide else torch.float32),
    )


def visible(
    ahead: Tensor,
    causal: bool,
    window: tuple[int, int] | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Which key each query sees, [B or 1, 1, T, S] bool; `ahead` is key minus query place."""
    left, right = (-1, -1) if window is None else window
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen = seen & (ahead <= 0)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    seen = seen[None, None]
    if documents is not None:
        run = document_runs(documents)
        seen = seen & (run[:, None, :, None] == run[:, None, None, :])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return seen


def document_runs(documents: Tensor) -> Tensor:
    """Number each run of equal ids along T, [B, T]: a document is such a run."""
    changed = documents[:, 1:] != documents[:, :-1]
    return torch.nn.functional.pad(changed.long().cumsum(1), (1, 0))
