"""Sizes: tokens of a chunk, and columns and warps of a program of the row kernel.

`scripts/bench_linear_cross_entropy.py` times them on the card at hand: `--sweep` chunks, `--rows`
tiles; what they gave on one H200 is in README.md.
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
# fp32 two), in registers that let two such programs run. Of longer rows one program: 128,256 words
# take 661 µs for 4096 rows, 731 with two
_SMALL = Tile(block=4096, warps=16, programs=2, unroll=3)
_LONG = Tile(block=8192, warps=32, programs=1, unroll=2)
_FP32 = Tile(block=2048, warps=8, programs=4, unroll=1)
LONG = 65536  # words
# a few dozen words then cross several blocks, and a program takes several rows
_INTERPRETER = Tile(block=32, warps=1, programs=3)


def choose(device: torch.device, dtype: torch.dtype, words: int) -> Tile:
    """The row kernel's tile for rows of so many logits of this dtype."""
    if device.type == "cpu":
        return _INTERPRETER
    if dtype.itemsize != 2:
        return _FP32
    return _LONG if words > LONG else _SMALL


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: `tokens` in even parts, an eighth at most unless that is too few."""
    limit = max(tokens // SHARE, LEAST)
    count = max(-(-tokens // limit), 1)
    even = -(-tokens // count)
    return max(min(-(-even // MULTIPLE) * MULTIPLE, limit), 1)
