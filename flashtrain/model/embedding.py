"""Token ids to vectors."""

import torch
from torch import Tensor, nn

from kernels.embedding import embedding


class Embedding(nn.Module):
    """`tokens [B, T] int64 -> [B, T, D]` in the compute dtype; fp32 table `weight [V, D]`."""

    def __init__(self, vocabulary: int, d_model: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(vocabulary, d_model, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight, self.dtype)

    def add(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`x [B, T, D]` with a vector per position, [T, D] or [B, T, D], added."""
        return x + vectors.to(x.dtype)
