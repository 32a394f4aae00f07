"""Sizes: tokens of a chunk, and columns and warps of a program of the row kernel.

`scripts/bench_linear_cross_entropy.py --sweep` times chunks and tiles on the card at hand; what it
gave on one H200 (V = 50304, 32,768 tokens) is in README.md.
"""

from dataclasses import dataclass

import torch

SHARE = 8  # a chunk holds at most one in so many tokens, hence of the logits
# but this many tokens at least, or the products slow down: at 1024, 2048, 4096 and 8192 tokens 569,
# 619, 630 and 657 TFLOP/s at width 2048, and 480, 532, 566 and 577 at width 768
LEAST = 2048
MULTIPLE = 128  # rows of a product's tile
PADDING = 64  # logits rows start at multiples of so many columns: 128 bytes in 16 bits


@dataclass(frozen=True)
class Tile:
    """A program reads one row, `block` columns at a time, with `warps` warps."""

    block: int
    warps: int


# 16 numbers a thread, two 16-byte loads, and four programs on an SM keep enough bytes on the way:
# 2,578 GB/s read and written on an H200, 4,096 columns 2,334 and 16,384 columns 1,939
_GPU = Tile(block=8192, warps=16)
_INTERPRETER = Tile(block=32, warps=1)  # a few dozen words then cross several blocks


def choose(device: torch.device) -> Tile:
    """The row kernel's tile."""
    return _INTERPRETER if device.type == "cpu" else _GPU


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: `tokens` in even parts, an eighth at most unless that is too few."""
    limit = max(tokens // SHARE, LEAST)
    count = max(-(-tokens // limit), 1)
    even = -(-tokens // count)
    return max(min(-(-even // MULTIPLE) * MULTIPLE, limit), 1)
