"""Tile sizes per GPU family, head size, pass and mask, and whether a card has room for them.

`python scripts/sweep_attention.py` times the candidates on the card at hand and prints
what belongs here. An entry without a date below was not timed: it is the largest tile that
compiles with little or no spilling (tests/kernels/attention/test_tiles.py holds the limits).
"""

from dataclasses import dataclass
from functools import cache

import torch

OLDEST = (8, 0)
# shared memory one program may use, in bytes (CUDA programming guide, compute capabilities)
SHARED_LIMIT = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}


@dataclass(frozen=True)
class Tile:
    """Rows of a query tile, rows of a key tile, warps of a program, depth of its load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False  # load the walking tiles with Hopper's copy engine where their layout allows
    spills: int = 0  # bytes of registers a thread may spill; tests hold every entry to its claim


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel that multiplies matrices."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    dbias: Tile | None = None  # where a bias may come


def _tma(queries: int, keys: int, warps: int, stages: int, spills: int = 0) -> Tile:
    return Tile(queries, keys, warps, stages, tma=True, spills=spills)


# (padded head size up to, causal) -> tiles, for two-byte types
_SM90 = {
    (32, False): Tiles(_tma(128, 64, 8, 3), _tma(64, 128, 8, 3), _tma(128, 64, 8, 3)),
    (32, True): Tiles(_tma(128, 64, 8, 3), _tma(64, 128, 8, 3), _tma(128, 64, 8, 3)),
    # 64 and 128: swept at 16k tokens of length 4096 on one H200 (2026-11-22, triton 3.6)
    (64, False): Tiles(Tile(128, 64, 8, 3), _tma(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (64, True): Tiles(Tile(128, 64, 8, 3), _tma(64, 64, 4, 3), _tma(64, 64, 4, 3)),
    (128, False): Tiles(_tma(128, 128, 8, 3), _tma(64, 64, 4, 2, 160), _tma(128, 64, 8, 3)),
    (128, True): Tiles(_tma(128, 128, 8, 3), _tma(64, 64, 4, 2, 160), _tma(128, 64, 8, 3)),
    (256, False): Tiles(_tma(128, 64, 8, 2), _tma(32, 64, 8, 2, 64), _tma(64, 64, 8, 2)),
    (256, True): Tiles(_tma(128, 64, 8, 2), _tma(32, 64, 8, 2, 64), _tma(64, 64, 8, 2)),
}
# sized for the 99 KB of sm_86, 89 and 120
_SM80 = {
    (32, False): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3, spills=32), Tile(64, 64, 4, 3)),
    (32, True): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3, spills=32), Tile(64, 64, 4, 3)),
    (64, False): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 8, 2, spills=128), Tile(64, 64, 4, 3)),
    (64, True): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 8, 2, spills=128), Tile(64, 64, 4, 3)),
    (128, False): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2, spills=16), Tile(64, 64, 8, 2)),
    (128, True): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2, spills=16), Tile(64, 64, 8, 2)),
    (256, False): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (256, True): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
# With a bias the loops also hold a tile of it, of up to four bytes a score, and its pipeline; with
# dropout the ten rounds of Philox. Not timed.
_CROWDED_SM90 = {
    64: Tiles(
        Tile(128, 64, 8, 3),
        _tma(32, 64, 4, 2, 48),
        _tma(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
    ),
    128: Tiles(
        _tma(128, 64, 8, 3),
        _tma(32, 64, 4, 2, 256),
        _tma(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
    ),
    256: Tiles(
        _tma(64, 64, 8, 2),
        _tma(32, 64, 8, 2, 168),
        _tma(64, 64, 8, 2, 208),
        Tile(32, 64, 8, 2),
    ),
}
_CROWDED_SM80 = {
    64: Tiles(
        Tile(128, 64, 8, 2),
        Tile(32, 64, 8, 2, spills=80),
        Tile(64, 64, 8, 2),
        Tile(64, 64, 8, 2, spills=8),
    ),
    128: Tiles(
        Tile(128, 64, 8, 2, spills=32),
        Tile(32, 64, 8, 2, spills=168),
        Tile(64, 64, 8, 2),
        Tile(64, 64, 8, 2, spills=56),
    ),
    256: Tiles(
        Tile(64, 32, 8, 2),
        Tile(32, 32, 8, 2, spills=80),
        Tile(32, 32, 8, 2),
        Tile(32, 32, 8, 2, spills=8),
    ),
}
# float32 multiplies without tensor cores (tf32 would miss the accuracy rule), so registers rule
_FMA = Tile(32, 32, 8, 1, spills=192)
_FLOAT32 = {
    128: Tiles(_FMA, _FMA, _FMA, _FMA),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# small and uneven, so that a few dozen tokens cross several tiles
_INTERPRETER = Tiles(
    Tile(32, 16, 1, 1, True), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1, True), Tile(16, 32, 1, 1)
)


def choose(
    device: torch.device,
    head_size: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    crowded: bool = False,
) -> Tiles:
    """The tiles for a call.

    Args:
        head_size: the larger one, where those of keys and values differ.
        crowded: with a bias or dropout.
        device: a CUDA device of capability 8.0 or newer, or the CPU for Triton's interpreter.

    Raises:
        ValueError: the card's shared memory cannot hold them.
    """
    if device.type == "cpu":
        return _INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    return choose_for(capability, head_size, dtype, causal=causal, crowded=crowded)


@cache
def choose_for(
    capability: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    crowded: bool = False,
) -> Tiles:
    """The same by capability, with the check: needs no GPU."""
    if dtype == torch.float32:
        tiles = _FLOAT32[128 if head_size <= 128 else 256]
    elif crowded:
        crowd = _CROWDED_SM90 if capability[0] in (9, 10) else _CROWDED_SM80
        tiles = crowd[next(size for size in (64, 128, 256) if head_size <= size)]
    else:
        table = _SM90 if capability[0] in (9, 10) else _SM80
        bucket = next(size for size in (32, 64, 128, 256) if head_size <= size)
        tiles = table[bucket, causal]
    check_shared(capability, tiles, head_size, dtype)
    return tiles


def check_shared(
    capability: tuple[int, int], tiles: Tiles, head_size: int, dtype: torch.dtype
) -> None:
    """Refuse tiles the card has no room for, before Triton compiles them.

    What a bias adds is left to the tests, which compile every tile for one in float32.

    Raises:
        ValueError: naming the pass, the bytes it needs and the bytes there are.
    """
    limit = SHARED_LIMIT.get(capability)
    if limit is None:
        return  # a card newer than this table: Triton's own check at launch decides
    needs = {
        "forward": forward_shared(capability, tiles.forward, head_size, dtype),
        "dK/dV": dkdv_shared(capability, tiles.dkdv, head_size, dtype),
        "dQ": dq_shared(capability, tiles.dq, head_size, dtype),
    }
    for name, need in needs.items():
        if need > limit:
            raise ValueError(
                f"the {name} tile for head size {head_size} in {dtype} needs {need} bytes of"
                f" shared memory, sm_{capability[0]}{capability[1]} has {limit}: choose a smaller"
                " one in kernels/attention/tiles.py"
            )


def forward_shared(
    capability: tuple[int, int], tile: Tile, head_size: int, dtype: torch.dtype
) -> int:
    """Bytes the forward kernel keeps in shared memory: its Q tile and the K, V pipeline."""
    rows = tile.queries + 2 * _buffers(capability, tile) * tile.keys
    return rows * _row_bytes(head_size, dtype)


def dkdv_shared(capability: tuple[int, int], tile: Tile, head_size: int, dtype: torch.dtype) -> int:
    """The same for the dK/dV kernel: K, V and the Q, dO, lse, delta pipeline."""
    buffers = _buffers(capability, tile)
    rows = 2 * (tile.keys + buffers * tile.queries)
    return rows * _row_bytes(head_size, dtype) + 8 * buffers * tile.queries


def dq_shared(capability: tuple[int, int], tile: Tile, head_size: int, dtype: torch.dtype) -> int:
    """The same for the dQ kernel: Q, dO and the K, V pipeline."""
    rows = 2 * tile.queries + 2 * _buffers(capability, tile) * tile.keys
    return rows * _row_bytes(head_size, dtype)


def _row_bytes(head_size: int, dtype: torch.dtype) -> int:
    padded = max(16, 1 << (head_size - 1).bit_length())
    return padded * dtype.itemsize


def _buffers(capability: tuple[int, int], tile: Tile) -> int:
    """Stages in shared memory: sm_80's pipeline multiplies out of registers, one stage ahead."""
    return tile.stages if capability[0] in (9, 10) else max(tile.stages - 1, 1)
