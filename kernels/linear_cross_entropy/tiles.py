"""Sizes: tokens of a chunk, and columns and warps of a program of the row kernel.

`scripts/bench_linear_cross_entropy.py` times them on the card at hand: `--sweep` chunks, of which
README.md has what one H200 gave (V = 50304, 32,768 tokens), and `--rows` tiles.
"""

from dataclasses import dataclass
from functools import cache

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
    `warps` warps; `programs` of them for each multiprocessor, 0: one for each row.

    keeps: where a row stays between the two walks, which is then read once: "shared" memory
    (rows_shared.py) or, of bf16, "registers" (rows_registers.py). A row has to `fit`, and both
    kernels do both walks.
    """

    block: int
    warps: int
    programs: int = 0
    unroll: int = 1
    keeps: str = ""

    def fits(self, words: int, dtype: torch.dtype) -> bool:
        """Whether it can keep rows of so many words."""
        if self.keeps == "registers" and dtype != torch.bfloat16:
            return False  # two of another type do not come out of a register by shift and mask
        return -(-words // self.block) * self.block * dtype.itemsize <= KEPT_BYTES


# Of a row that is kept: half of a multiprocessor's shared memory, so that two programs run, or of
# its registers, so that the other half computes
KEPT_BYTES = 112 * 1024
# Rows in flight are to stay in 50 MB of L2 between the two walks: two programs on a multiprocessor
# are 264 rows of 100 kB on an H200. Three loads of 16 bytes a thread are on their way at a time (of
# fp32 two), in registers that let two such programs run
_SMALL = Tile(block=4096, warps=16, programs=2, unroll=3)
_FP32 = Tile(block=2048, warps=8, programs=4, unroll=1)
KEPT = Tile(block=4096, warps=16, programs=2, keeps="shared")
# a few dozen words then cross several blocks, and a program takes several rows
_INTERPRETER = Tile(block=32, warps=1, programs=3)


def choose(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, walked_twice: int | None = None
) -> Tile:
    """The row kernel's tile for logits of this dtype; `walked_twice`: words of a row that is both
    measured and differentiated, else there is nothing to keep it for."""
    if device.type == "cpu":
        return _INTERPRETER
    if walked_twice is not None and KEPT.fits(walked_twice, dtype) and _has_room(device):
        return KEPT
    return _SMALL if dtype.itemsize == 2 else _FP32


@cache
def _has_room(device: torch.device) -> bool:
    """Hopper: 227 kB of shared memory for a multiprocessor's programs; others have 163 or less."""
    return torch.cuda.get_device_capability(device)[0] == 9


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: `tokens` in even parts, an eighth at most unless that is too few."""
    limit = max(tokens // SHARE, LEAST)
    count = max(-(-tokens // limit), 1)
    even = -(-tokens // count)
    return max(min(-(-even // MULTIPLE) * MULTIPLE, limit), 1)
