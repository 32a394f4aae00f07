"""Tokens and heads of a program of the rotation; `scripts/bench_block.py --sweep` times others."""

from dataclasses import dataclass

import torch

PAIRS = 2048  # of a program: 16 a thread, in two loads of 16 bytes each way


@dataclass(frozen=True)
class Tile:
    tokens: int
    heads: int
    warps: int


def tile_for(heads: int, half: int, device: torch.device) -> Tile:
    """heads, half: how many heads are turned, and how many pairs of dims of each."""
    if device.type == "cpu":
        return Tile(2, 4, 1)
    # up to 8 heads, which share a token's cos and sin; fewer where that leaves no lane idle
    shared = min(heads & -heads, 8)
    if shared < 4:
        shared = min(_padded(heads), 8)
    return Tile(max(PAIRS // (shared * _padded(half)), 1), shared, 4)


def _padded(count: int) -> int:
    """To a power of two, as the kernel does."""
    return 1 << (count - 1).bit_length()
