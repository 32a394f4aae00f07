"""Tile sizes of the cast kernels; `scripts/bench_fp8.py --sweep` times others on the card at hand.

What these give on a card is in README.md once measured.
"""

from dataclasses import dataclass

import torch

ROW_LIMIT = 65536  # numbers of a row that one program holds in registers


@dataclass(frozen=True)
class Tile:
    """A program's rows and columns, and its warps."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Walk:
    """Rows and columns that a program has at a time, `programs` of them for each multiprocessor,
    which load `stages` - 1 turns ahead."""

    rows: int
    columns: int
    warps: int
    programs: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    maximum: int  # numbers of a program of the maximum kernel, 8 warps
    tensorwise: Tile
    columnwise: Tile  # `rows` at a time, all rows in turn
    hidden: Tile  # of an MLP's activations and their gradients
    gated: Tile
    gated_maxima: Walk


# 128 rows are 128 bytes of a row of the transposed result: whole lines are written. An MLP's casts,
# forward and backward, µs on one H100 (2026-11-28): GELU, 16384 x 8192, at 64 rows 193 and 272, at
# 128 191 and 278; SwiGLU, 8192 x 14336, 240 and 420, 247 and 433, at 128 x 32 268 and 451
_GPU = Tiles(
    16384, Tile(128, 64, 8), Tile(128, 32, 4),
    Tile(64, 64, 8), Tile(64, 64, 8), Walk(rows=8, columns=256, warps=4, programs=6, stages=3),
)  # fmt: skip
_INTERPRETER = Tiles(  # small matrices have several tiles
    64, Tile(16, 32, 1), Tile(16, 16, 1),
    Tile(16, 32, 1), Tile(16, 16, 1), Walk(rows=4, columns=16, warps=1, programs=4, stages=1),
)  # fmt: skip


def choose(device: torch.device) -> Tiles:
    return _INTERPRETER if device.type == "cpu" else _GPU


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` numbers: 16 numbers a thread."""
    return min(max(block // 512, 1), 32)
