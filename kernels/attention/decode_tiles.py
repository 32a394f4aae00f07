"""Decoding: how large a key tile is, and over how many programs a sequence's keys are split.

`python scripts/bench_decode.py --sweep` times the candidates on the card at hand. No entry here was
timed yet: each compiles without spilling, and on sm_90 leaves room for two programs or more.
"""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.attention.tiles import SHARED_LIMIT

# query rows, which are tokens x grouped heads: tl.dot wants 16, and beyond the most come more tiles
ROW_TILES = (16, 32, 64)
FLOAT32_ROWS = 32  # float32 holds its tiles in registers
# what a program costs beside its keys, in key tiles: its start, and with splits the merging pass
START, MERGE = 2.0, 3.0
MOST_SPLITS = 256
REGISTERS = 65_536  # of a multiprocessor, from sm_80 to sm_120
RESERVED = 1024  # bytes of shared memory the system takes of each program
WITHIN = 1.05  # of the cheapest number of splits, the largest: ragged batches then balance better


@dataclass(frozen=True)
class DecodeTile:
    """Keys of a tile, warps of a program, depth of its load pipeline."""

    keys: int
    warps: int
    stages: int


# (rows of a query tile up to, larger head size up to) -> tile, for two-byte types
_SM90 = {
    (32, 32): DecodeTile(128, 4, 4),
    (32, 64): DecodeTile(128, 4, 3),
    (32, 128): DecodeTile(64, 4, 3),
    (32, 256): DecodeTile(32, 4, 3),
    (64, 32): DecodeTile(128, 4, 3),
    (64, 64): DecodeTile(128, 4, 3),
    (64, 128): DecodeTile(64, 4, 3),
    (64, 256): DecodeTile(32, 8, 2),
}
# sized for the 99 KB of sm_86, 89 and 120
_SM80 = {
    (32, 32): DecodeTile(128, 4, 3),
    (32, 64): DecodeTile(64, 4, 3),
    (32, 128): DecodeTile(32, 4, 3),
    (32, 256): DecodeTile(16, 4, 3),
    (64, 32): DecodeTile(64, 4, 3),
    (64, 64): DecodeTile(64, 4, 3),
    (64, 128): DecodeTile(32, 4, 3),
    (64, 256): DecodeTile(16, 8, 3),
}
# float32 multiplies without tensor cores, out of registers
_FLOAT32 = {
    (32, 32): DecodeTile(64, 4, 3),
    (32, 64): DecodeTile(32, 4, 3),
    (32, 128): DecodeTile(16, 8, 3),
    (32, 256): DecodeTile(16, 8, 3),
}
# small, so that a few dozen keys cross several tiles
_INTERPRETER = DecodeTile(16, 1, 1)
_INTERPRETER_SLOTS = 16


def query_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows of a query tile for `rows` = tokens x grouped heads."""
    sizes = [size for size in ROW_TILES if dtype != torch.float32 or size <= FLOAT32_ROWS]
    return next((size for size in sizes if rows <= size), sizes[-1])


def choose(
    device: torch.device, rows: int, head_size: int, v_head_size: int, dtype: torch.dtype
) -> DecodeTile:
    """The tile of a call.

    Args:
        device: a CUDA device of capability 8.0 or newer, or the CPU for Triton's interpreter.
        rows: of a query tile.

    Raises:
        ValueError: the card's shared memory cannot hold it.
    """
    if device.type == "cpu":
        return _INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    return choose_for(capability, rows, head_size, v_head_size, dtype)


@cache
def choose_for(
    capability: tuple[int, int], rows: int, head_size: int, v_head_size: int, dtype: torch.dtype
) -> DecodeTile:
    """The same by capability, with the check: needs no GPU."""
    table = _SM90 if capability[0] in (9, 10) else _SM80
    if dtype == torch.float32:
        table = _FLOAT32
    size = max(head_size, v_head_size)
    tile = next(tile for (most, head), tile in table.items() if rows <= most and size <= head)
    need = shared_bytes(capability, tile, rows, head_size, v_head_size, dtype)
    limit = SHARED_LIMIT.get(capability, need)  # a card newer than the table: Triton checks
    if need > limit:
        raise ValueError(
            f"the decoding tile for head sizes {head_size} and {v_head_size} in {dtype} needs"
            f" {need} bytes of shared memory, sm_{capability[0]}{capability[1]} has {limit}:"
            " choose a smaller one in kernels/attention/decode_tiles.py"
        )
    return tile


def shared_bytes(
    capability: tuple[int, int],
    tile: DecodeTile,
    rows: int,
    head_size: int,
    v_head_size: int,
    dtype: torch.dtype,
) -> int:
    """Bytes a program keeps in shared memory: q, the weights, and K and V ahead of their use."""
    # Hopper multiplies 64 rows straight out of shared memory; else tiles pass through registers
    direct = rows == 64 and capability[0] in (9, 10)
    buffers = tile.stages if direct else max(tile.stages - 1, 1)
    values = buffers * tile.keys * (_padded(head_size) + _padded(v_head_size))
    values += rows * _padded(head_size)
    if rows < 64:  # warps share rows, so they exchange the weights
        values += rows * tile.keys
    return values * dtype.itemsize


def choose_splits(
    device: torch.device,
    tile: DecodeTile,
    programs: int,
    keys: int,
    rows: int,
    head_size: int,
    v_head_size: int,
    dtype: torch.dtype,
) -> int:
    """Over how many programs each sequence's keys go, from sizes alone.

    Args:
        programs: there would be without splitting.
        keys: at most seen by a sequence.
    """
    # writing and reading a part in float32, against reading a tile of keys
    part = 8 * rows * v_head_size
    merge = MERGE + part / (tile.keys * (head_size + v_head_size) * dtype.itemsize)
    slots = _INTERPRETER_SLOTS
    if device.type != "cpu":
        slots = _slots(device, tile, rows, head_size, v_head_size, dtype)
    return splits_for(slots, programs, -(-keys // tile.keys), merge)


@cache
def splits_for(slots: int, programs: int, tiles: int, merge: float) -> int:
    """The number of splits that takes the fewest key tiles of time.

    Programs run in waves of `slots`; each takes START and its share of `tiles`, and `merge` where
    there is something to merge. Only numbers that give the last split something to do count.
    """
    cost = {}
    for share in range(1, tiles + 1):
        n = -(-tiles // share)
        if n <= MOST_SPLITS:
            waves = -(-programs * n // slots)
            cost[n] = waves * (START + share + (merge if n > 1 else 0.0))
    if not cost:
        return 1
    least = min(cost.values())
    return max(n for n, value in cost.items() if value <= WITHIN * least)


@cache
def _slots(
    device: torch.device,
    tile: DecodeTile,
    rows: int,
    head_size: int,
    v_head_size: int,
    dtype: torch.dtype,
) -> int:
    """Programs the card runs at a time: bound by shared memory and by 128 registers a thread."""
    about = torch.cuda.get_device_properties(device)
    capability = (about.major, about.minor)
    shared = shared_bytes(capability, tile, rows, head_size, v_head_size, dtype)
    by_memory = about.shared_memory_per_multiprocessor // (shared + RESERVED)
    by_registers = REGISTERS // (128 * 32 * tile.warps)
    slots: int = about.multi_processor_count * max(min(by_memory, by_registers), 1)
    return slots


def _padded(head_size: int) -> int:
    return max(16, 1 << (head_size - 1).bit_length())
