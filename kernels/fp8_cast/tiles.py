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
    summed: Tile  # the same, with sums over its rows
    columnwise: Tile  # `rows` at a time, all rows in turn
    hidden: Tile  # of an MLP's activations and their gradients
    hidden_summed: Tile
    gated: Tile
    gated_maxima: Walk


# µs on one H200 (2026-11-28). A gradient with sums in 8 / 4 warps: 118 / 94 (32768 x 2304), 47 / 38
# (32768 x 768); without sums in 8 warps 80 and 28. GELU, 32768 x 3072, with 64 x 64 in 8 warps /
# with these: forward 130 / 118, backward 168 / 159, with sums 251 / 203.
# SwiGLU, 8192 x 14336, on one H100, forward and backward: 240 and 420, at 128 rows 247 and 433
_GPU = Tiles(
    16384, Tile(128, 64, 8), Tile(128, 64, 4), Tile(128, 32, 4),
    Tile(32, 128, 4), Tile(64, 64, 4), Tile(64, 64, 8),
    Walk(rows=8, columns=256, warps=4, programs=6, stages=3),
)  # fmt: skip
_INTERPRETER = Tiles(  # small matrices have several tiles
    64, Tile(16, 32, 1), Tile(16, 16, 1), Tile(16, 16, 1),
    Tile(16, 32, 1), Tile(16, 16, 1), Tile(16, 16, 1),
    Walk(rows=4, columns=16, warps=1, programs=4, stages=1),
)  # fmt: skip


def choose(device: torch.device) -> Tiles:
    return _INTERPRETER if device.type == "cpu" else _GPU


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` numbers: 16 numbers a thread."""
    return min(max(block // 512, 1), 32)
