"""Tokens and heads of a program of the rotation; `scripts/bench_block.py --sweep` times others."""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.sizes import padded

PAIRS = 2048  # of a program: 16 a thread, in two loads of 16 bytes each way


@dataclass(frozen=True)
class Tile:
    tokens: int
    heads: int
    warps: int


@cache
def tile_for(heads: int, half: int, device: torch.device) -> Tile:
    """heads, half: how many heads are turned, and how many pairs of dims of each."""
    if device.type == "cpu":
        return Tile(2, 4, 1)
    # up to 8 heads, which share a token's cos and sin; fewer where that leaves no lane idle
    shared = min(heads & -heads, 8)
    if shared < 4:
        shared = min(padded(heads), 8)
    return Tile(max(PAIRS // (shared * padded(half)), 1), shared, 4)
