"""Tiles of the Hopper kernels, per head size and mask.

`python scripts/bench_hopper.py` times them beside their neighbours (parts/hopper_variants.py).
"""

from dataclasses import dataclass, replace

MIB = 1 << 20


@dataclass(frozen=True)
class ForwardTile:
    """How the forward kernel works through its tiles."""

    consumers: int  # warpgroups of 64 query rows: 2 or 3
    keys: int  # of a key tile
    stages: int  # key and value tiles in flight


@dataclass(frozen=True)
class BackwardTile:
    """How the backward kernel works through its tiles of 128 keys."""

    queries: int  # of a query tile: 64 or 128
    stages: int  # query tiles in flight
    early: bool = False  # issue dP beside S, not after the softmax
    ahead: bool = False  # issue S of the next tile before this one is done; plain masks only


LARGEST_HEAD = {"forward": 256, "backward": 128}


def padded_head(head_size: int) -> int:
    """What the kernels compute with: the copy engine fills the rest of a block with zeros."""
    return 64 if head_size <= 64 else 128 if head_size <= 128 else 256


# (padded head size, causal)
FORWARD = {
    (64, False): ForwardTile(3, 128, 2),
    (64, True): ForwardTile(3, 128, 3),
    (128, False): ForwardTile(2, 128, 2),
    (128, True): ForwardTile(2, 128, 2),
    (256, False): ForwardTile(2, 64, 2),
    (256, True): ForwardTile(2, 64, 2),
}
BACKWARD = {
    (64, False): BackwardTile(128, 2, early=True),
    (64, True): BackwardTile(128, 2),
    (128, False): BackwardTile(64, 2),
    (128, True): BackwardTile(64, 2),
}
AHEAD = 2048  # queries from which on, at D = 128, scores a tile ahead are worth it
# three consumers are worth +10 % at D = 64, unless under a causal mask tiles of 192 queries leave
# much of the last one empty: at 1024 causal queries these ran at 314 TFLOP/s, the three at 284
FORWARD_128_ROWS = ForwardTile(2, 128, 4)
MOST_EMPTY = 1.1  # times the rows that tiles of 128 take
# bytes that the tiles standing together (schedule.py) span, so that they stay in L2
TOGETHER = {"forward": 32 * MIB, "backward": 16 * MIB}  # of K and V; of Q, dO and dQ


def choose_forward(
    head_size: int,
    causal: bool,
    queries: int,
    *,
    limits: bool = False,
    biased: bool = False,
    documents: bool = False,
) -> ForwardTile:
    """The tile for a call with so many queries.

    Args:
        causal: or nearly: rows of different lengths.
        limits: a window or documents; with a bias or soft cap they leave three consumers no room.
        biased: ALiBi or a soft cap.
        documents: of 512 tokens on average, tiles of 192 rows leave 63 % of a program's scores in
            use and tiles of 128 rows 70 % (counted over random lengths, 128 keys).
    """
    size = padded_head(head_size)
    empty = -(-queries // 192) * 192 > MOST_EMPTY * (-(-queries // 128) * 128)
    if size == 64 and ((causal and empty) or (limits and biased) or documents):
        return FORWARD_128_ROWS
    return FORWARD[size, causal]


def choose_backward(
    head_size: int, causal: bool, queries: int, *, limits: bool = False, biased: bool = False
) -> BackwardTile:
    """The tile for a call; masks with two ends (`limits`) need registers of their own, and so do
    ALiBi and a soft cap (`biased`)."""
    size = padded_head(head_size)
    tile = BACKWARD[size, causal]
    if limits:
        return BackwardTile(64, 3 if size == 64 else 2)
    return replace(tile, ahead=size == 128 and queries >= AHEAD and not biased)
