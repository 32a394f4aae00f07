"""Rows and warps of a program of the norm kernels; `scripts/bench_norm.py --sweep` times others."""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.sizes import padded

LONGEST = 16384  # numbers of a row, which one program holds in registers


@dataclass(frozen=True)
class Tile:
    """`rows` at a time in `warps` warps. Of the backward: `programs` for each multiprocessor, which
    load `stages` - 1 turns ahead."""

    rows: int
    warps: int
    programs: int = 1
    stages: int = 1


@cache
def forward_tile(columns: int, device: torch.device) -> Tile:
    if device.type == "cpu":
        return Tile(2, 1)
    block = padded(columns)
    return Tile(max(2048 // block, 1), min(max(block // 512, 2), 16))


@cache
def backward_tile(columns: int, device: torch.device, biased: bool = True) -> Tile:
    """As many programs as registers let run at once: three tensors and their sums stay in them,
    one of dw, and two more where there are biases."""
    if device.type == "cpu":
        return Tile(2, 1, 3)
    block = padded(columns)
    if block <= 1024:
        return Tile(2, 4, 4, 3)
    if block <= 2048:
        return Tile(1, 8, 2 if biased else 4, 3)
    return Tile(1, min(block // 256, 32), max(4096 // block, 1), 2)
