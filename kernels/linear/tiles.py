"""Sizes of the passes; `scripts/bench_block.py --only mlp --sweep` times others."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` numbers at a time in `warps` warps, `programs` of them for each
    multiprocessor, which load `stages` - 1 turns ahead."""

    rows: int
    columns: int
    warps: int
    programs: int
    stages: int


# 16 numbers of a tensor a thread, two 16-byte loads; six programs' registers fit, GELU written too
_GPU = Tile(rows=8, columns=256, warps=4, programs=6, stages=3)
_INTERPRETER = Tile(rows=4, columns=16, warps=1, programs=4, stages=1)


def pass_tile(device: torch.device) -> Tile:
    """Of GELU's backward and of sums over tokens."""
    return _INTERPRETER if device.type == "cpu" else _GPU


def cast_block(device: torch.device) -> int:
    """Numbers of a program, four warps: 8 a thread, two 16-byte loads of fp32."""
    return 32 if device.type == "cpu" else 1024
