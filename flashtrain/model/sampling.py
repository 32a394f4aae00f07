"""From logits to the next token, on the device: temperature, top-k, top-p, min-p.

Every draw spends one uniform number that the caller made on the CPU from a seed, so the same seed
and logits give the same token in any batch, and nothing is read back to the host.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from softmax(logits / temperature); the cuts apply in this order.

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0  # 0: the likeliest token always
    top_k: int | None = None  # of the k likeliest
    top_p: float | None = None  # of the fewest that hold this share (Holtzman et al. 2020)
    min_p: float | None = None  # of those with this share of the likeliest's (arXiv:2407.01082)
    seed: int = 0  # the n-th prompt of a batch takes seed + n

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be 0 (likeliest token) or above, and finite"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or left out")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(
                    f"{name}={share} must lie above 0 and at most at 1, or be left out"
                )


def uniform_numbers(seed: int, rows: int, n: int) -> Tensor:
    """`[n, rows]` fp32 in [0, 1): row r is what seed + r gives alone."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(n, generator=generator) for generator in generators], dim=1)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, V] fp32, uniform [B] in [0, 1) -> ids [B] int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled, ids = logits / sampling.temperature, None
    if sampling.top_k is not None:
        scaled, ids = scaled.topk(min(sampling.top_k, scaled.shape[-1]))
    elif sampling.top_p is not None:
        scaled, ids = scaled.sort(descending=True, stable=True)
    shares = scaled.softmax(-1)
    if sampling.top_p is not None:
        before = shares.cumsum(-1) - shares  # the likeliest token has nothing before it
        shares = shares.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p is not None:
        shares = shares.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), 0)
    index = _at_share(shares, uniform)
    return index if ids is None else ids.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _at_share(shares: Tensor, uniform: Tensor) -> Tensor:
    """The index [B] at which the running sum of `shares` [B, V] passes uniform x the whole.

    By two scans of about sqrt(V) numbers: one scan over V is cut into thread blocks whose order,
    and so whose rounding, differs from run to run on a GPU.
    """
    width = math.isqrt(shares.shape[-1] - 1) + 1
    parts = F.pad(shares, (0, -shares.shape[-1] % width)).unflatten(-1, (-1, width))
    sums = parts.sum(-1)
    outer = sums.cumsum(-1)
    target = uniform * outer[:, -1]
    part = _first_above(outer, target).unsqueeze(-1)
    rest = target.unsqueeze(-1) - (outer.gather(-1, part) - sums.gather(-1, part))
    inside = parts.gather(1, part.unsqueeze(-1).expand(-1, 1, width)).squeeze(1)
    within = _first_above(inside.cumsum(-1), rest.squeeze(-1))
    return part.squeeze(-1) * width + within


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first index [B] of `running` [B, n] above `target`; at most where it ends to rise."""
    last = (running < running[:, -1:]).sum(-1)
    return torch.minimum((running <= target.unsqueeze(-1)).sum(-1), last)
