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
    """A program reads row after row, `block` columns at a time and `unroll` of those at once, with
    `warps` warps; `programs` of them for each multiprocessor, 0: one for each row."""

    block: int
    warps: int
    programs: int = 0
    unroll: int = 1


# Rows in flight are to stay in 50 MB of L2 between the two walks: two programs on a multiprocessor
# are 264 rows of 100 kB on an H200. Three loads of 16 bytes a thread are on their way at a time (of
# fp32 two), in registers that let two such programs run
_SMALL = Tile(block=4096, warps=16, programs=2, unroll=3)
_FP32 = Tile(block=4096, warps=16, programs=2, unroll=1)
# a few dozen words then cross several blocks, and a program takes several rows
_INTERPRETER = Tile(block=32, warps=1, programs=3)


def choose(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The row kernel's tile for logits of this dtype."""
    if device.type == "cpu":
        return _INTERPRETER
    return _SMALL if dtype.itemsize == 2 else _FP32


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: `tokens` in even parts, an eighth at most unless that is too few."""
    limit = max(tokens // SHARE, LEAST)
    count = max(-(-tokens // limit), 1)
    even = -(-tokens // count)
    return max(min(-(-even // MULTIPLE) * MULTIPLE, limit), 1)
