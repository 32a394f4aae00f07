"""The ends of what each row sees, found by the producer a tile ahead and handed to the consumers.

For windows and documents (LIMITS, see masks.py) a tile starts with its rows' ends, which for
documents are loads from global memory, each waited for before the next step. Tiles of packed
documents take a few microseconds, so the producer does that while the consumers are at the tile
before, and they find the numbers in shared memory. `ends` is

    firsts, lasts   [places x warpgroups, 64] of the rows, one to a row
    spans           [places x 2, 1] first other row that any of them sees, and how many tiles
    full, empty     barriers of the places
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.masks import keys_of, queries_of
from kernels.attention.hopper.shim import barrier


@gluon.jit
def room_for_ends(PLACES: gl.constexpr, GROUPS: gl.constexpr, LIMITS: gl.constexpr):
    """`ends` for so many warpgroups, with its barriers ready."""
    ends = (0, 0, 0, 0, 0)
    if LIMITS:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        firsts = gl.allocate_shared_memory(gl.int32, [PLACES * GROUPS, 64], FLAT)
        lasts = gl.allocate_shared_memory(gl.int32, [PLACES * GROUPS, 64], FLAT)
        spans = gl.allocate_shared_memory(gl.int32, [PLACES * 2, 1], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BARRIER)
        for i in gl.static_range(PLACES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=GROUPS)
        ends = (firsts, lasts, spans, full, empty)
    return ends


@gluon.jit
def hand_over(
    row, span, turn, b, T, S, limits, ends,
    PLACES: gl.constexpr, GROUPS: gl.constexpr, OF_KEYS: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """Producer: what the rows from `row` on see; they are keys if OF_KEYS, else queries."""
    if LIMITS:
        firsts, lasts, spans, full, empty = ends
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        at = turn % PLACES
        mbarrier.wait(empty.index(at), ((turn // PLACES) & 1) ^ 1)
        for w in gl.static_range(GROUPS):
            rows = row + w * 64 + gl.arange(0, 64, LANES)
            if OF_KEYS:
                first, last = queries_of(rows, b, T, S, limits, LIMITS)
            else:
                first, last = keys_of(rows, b, T, S, limits, LIMITS)
            firsts.index(at * GROUPS + w).store(first)
            lasts.index(at * GROUPS + w).store(last)
        start, count = span
        spans.index(at * 2).store(gl.full([1], start, gl.int32, LANES))
        spans.index(at * 2 + 1).store(gl.full([1], count, gl.int32, LANES))
        barrier()
        mbarrier.arrive(full.index(at), count=1)


@gluon.jit
def number_at(smem, i: gl.constexpr):
    """Number i of a vector in shared memory, for a consumer."""
    return gl.max(smem.slice(i, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
