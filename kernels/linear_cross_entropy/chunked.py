"""The loop over chunks of tokens: one chunk's logits in memory, gradients in the same pass.

Dims: N tokens, n tokens of a chunk, D width, V words of this shard. Per chunk, with H_c its hidden
states, Y its logits and G = d loss / d Y written over them:

    Y = H_c W^T        G = rows(Y)        dH_c = G W        dW += G^T H_c

Three products, as many as with all logits in memory. The products are the BLAS library's, in the
dtype of hidden; dW is summed in fp32.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels.linear_cross_entropy import rows_torch
from kernels.linear_cross_entropy.problem import Terms, VocabularyShard
from kernels.linear_cross_entropy.tiles import PADDING


def chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: Terms,
    shard: VocabularyShard | None,
    chunk: int,
    rows: ModuleType,
    *,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients, of which only those wanted are computed.

    Args:
        hidden: [N, D]; weight: [V, D], cast to hidden's dtype; labels: [N].
        chunk: tokens whose logits are in memory at a time.
        rows: rows_torch or rows_triton.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64); dH [N, D] in hidden's dtype; dW [V, D] in loss's dtype.
    """
    N, D = hidden.shape
    V = weight.size(0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(hidden.dtype)
    d_hidden = None
    if wants_hidden:
        d_hidden = torch.empty((N, D), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.empty((V, D), dtype=wide, device=hidden.device) if wants_weight else None
    if N == 0 and d_weight is not None:
        d_weight.zero_()
    statistics = torch.empty((2, N), dtype=wide, device=hidden.device)
    padded = -(-V // PADDING) * PADDING  # rows start aligned whatever the vocabulary
    shape = (min(chunk, N), padded)
    buffer = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)[:, :V]
    differentiates = wants_hidden or wants_weight
    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        h, its, own = hidden[part], labels[part], statistics[:, part]
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        if shard is None and differentiates:
            rows.measure_and_differentiate(logits, its, own, terms)
        else:
            rows.measure(logits, its, own, terms)
            if shard is not None:
                own.copy_(shard.combine(own))
            if differentiates:
                rows.differentiate(logits, its, own, terms)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[part])
        if d_weight is not None:
            _add_product(d_weight, logits, h, first=start == 0)
    vocabulary = V if shard is None else shard.vocabulary
    return _loss(statistics, labels, vocabulary, terms), d_hidden, d_weight


def rows_of(device: torch.device, dtype: torch.dtype, backend: str) -> ModuleType:
    """The module that computes the rows; ValueError where Triton is asked for what it cannot."""
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
    if backend == "torch":
        return rows_torch
    if dtype == torch.float64:
        raise ValueError("backend='triton' does not compute float64: take backend='torch'")
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.linear_cross_entropy import rows_triton

    return rows_triton


def _add_product(total: Tensor, d_logits: Tensor, h: Tensor, *, first: bool) -> None:
    """total [V, D] += d_logits^T h, in total's dtype; the first chunk overwrites it."""
    beta = 0 if first else 1
    if total.dtype != h.dtype and h.is_cuda:
        # 16-bit operands, fp32 sum and result: no product in memory beside the total
        torch.addmm(total, d_logits.t(), h, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(d_logits.t().to(total.dtype), h.to(total.dtype), beta=beta)


def _loss(statistics: Tensor, labels: Tensor, vocabulary: int, terms: Terms) -> Tensor:
    """Sum of token losses; NaN for a label outside, as nothing here waits for the device."""
    lse, target = statistics
    losses = lse - target
    if terms.z_loss:
        losses = losses + terms.z_loss * lse.square()
    outside = (labels < 0) | (labels >= vocabulary)
    losses = losses.masked_fill(outside, float("nan"))
    return losses.masked_fill(labels == terms.ignore_index, 0).sum()
