"""The rows of a chunk in plain PyTorch, for any device and dtype; the Triton kernel's twin.

Dims: n rows of the chunk, V words of this shard.
"""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import Terms

SCALED_AT_ONCE = 2**22  # numbers widened at a time, 16 MiB


def measure(logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms) -> None:
    """Write the statistics [2, n] of logits [n, V] and labels [n]."""
    x, _ = _scores(logits, statistics.dtype, terms)
    counted, local, here = _places(logits, labels, terms)
    statistics[0] = x.logsumexp(-1).masked_fill_(~counted, 0)
    statistics[1] = x.gather(-1, local[:, None]).squeeze(-1).masked_fill_(~here, 0)


def differentiate(logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms) -> None:
    """Turn logits [n, V] into d loss / d logits; statistics are those of the whole vocabulary."""
    x, bent = _scores(logits, statistics.dtype, terms)
    counted, local, here = _places(logits, labels, terms)
    lse = statistics[0].unsqueeze(-1)
    grad = (x - lse).exp_().mul_(1 + 2 * terms.z_loss * lse)
    grad.scatter_add_(-1, local[:, None], -here[:, None].to(grad.dtype))
    if bent is not None:
        grad.mul_(1 - bent.square())
    logits.copy_(grad.masked_fill_(~counted[:, None], 0))


def measure_and_differentiate(
    logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms
) -> None:
    """Both, where this shard is the whole vocabulary."""
    measure(logits, labels, statistics, terms)
    differentiate(logits, labels, statistics, terms)


def scale_into(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a 0-dim factor, in `dtype`, rounded once; in x's memory where the dtype is x's."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    flat, target = x.view(-1), out.view(-1)
    # a 0-dim factor is rounded to a 16-bit tensor's dtype first; widened, it is not
    for part, its in zip(flat.split(SCALED_AT_ONCE), target.split(SCALED_AT_ONCE), strict=True):
        its.copy_(part.to(factor.dtype) * factor)
    return out


def _scores(logits: Tensor, wide: torch.dtype, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """x of every product, widened, and tanh's value where there is a cap."""
    if not terms.softcap:
        return logits.to(wide), None
    bent = torch.tanh(logits.to(wide) / terms.softcap)
    return terms.softcap * bent, bent


def _places(logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels count, their column here (any where there is none), and which have one."""
    counted = labels != terms.ignore_index
    local = labels.long() - terms.first_word
    here = counted & (local >= 0) & (local < logits.size(-1))
    return counted, local.clamp(0, logits.size(-1) - 1), here
