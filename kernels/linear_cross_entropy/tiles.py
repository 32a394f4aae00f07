"""Sizes: tokens of a chunk, and columns and warps of a program of the row kernel.

All here are reasoned, none is swept yet: `scripts/bench_linear_cross_entropy.py --sweep` times
chunk sizes and tiles on the card at hand.
"""

from dataclasses import dataclass

import torch

SHARE = 10  # a chunk holds at most one in so many tokens, hence of the logits
LEAST = 1024  # but this many tokens at least: products of fewer rows leave the card half idle
MULTIPLE = 128  # rows of a product's tile
PADDING = 64  # logits rows start at multiples of so many columns: 128 bytes in 16 bits


@dataclass(frozen=True)
class Tile:
    """A program reads one row, `block` columns at a time, with `warps` warps."""

    block: int
    warps: int


# 16 numbers a thread, two 16-byte loads, and four programs on an SM keep enough bytes on the way
_GPU = Tile(block=8192, warps=16)
_INTERPRETER = Tile(block=32, warps=1)  # a few dozen words then cross several blocks


def choose(device: torch.device) -> Tile:
    """The row kernel's tile."""
    return _INTERPRETER if device.type == "cpu" else _GPU


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: `tokens` in even parts, a tenth of them at most unless that is too few."""
    limit = max(tokens // SHARE, LEAST)
    count = max(-(-tokens // limit), 1)
    even = -(-tokens // count)
    return max(min(-(-even // MULTIPLE) * MULTIPLE, limit), 1)
