"""Sizes and tensors of the blocks that scripts/bench_block.py times."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class Size:
    name: str
    N: int  # tokens
    D: int  # width
    biases: bool
    T: int  # tokens of a sequence
    head: int  # size


SIZES = (
    Size("124m", 32768, 768, True, 1024, 64),
    Size("350m", 16384, 1024, True, 1024, 64),
    Size("1.3b", 16384, 2048, False, 2048, 128),
)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def heads_of(size: Size) -> tuple[Tensor, Tensor, int]:
    """q, k and v of all heads [B, T, 3 H, D], the table [T, D], and how many heads are turned."""
    heads = size.D // size.head
    angles = torch.rand(size.T, size.head // 2, device="cuda") * 6
    qkv = randn(size.N // size.T, size.T, 3 * heads, size.head)
    return qkv, torch.cat((angles.cos(), angles.sin()), dim=-1), 2 * heads
