"""The order in which context ranks hold a sequence: rank r of c has chunks r and 2c-1-r of 2c.

Dims: B batch, T tokens of whole sequences, c ranks, L = T / 2c.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def own_chunks(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def join_parts(parts: Tensor) -> Tensor:
    """Whole sequences from all ranks' parts: [c, B, 2L, ...] -> [B, T, ...], one copy."""
    early, late = parts.chunk(2, dim=2)
    return torch.cat([*early.unbind(), *reversed(late.unbind())], dim=1)


def cut_parts(chunks: Sequence[Tensor]) -> Tensor:
    """The inverse of `join_parts`, of the 2c chunks [B, L, ...] in order -> [c, B, 2L, ...]."""
    size = len(chunks) // 2
    dealt = torch.stack([chunks[chunk] for rank in range(size) for chunk in own_chunks(rank, size)])
    parts: Tensor = dealt.unflatten(0, (size, 2)).transpose(1, 2)
    return parts.flatten(2, 3)  # of one sequence that is no second copy
