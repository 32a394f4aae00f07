"""Which tile a persistent program takes next, and in what order tiles stand.

Tiles of `chunk` heads stand together, longest row first, heads innermost: what the programs in
flight read then fits in L2, and the short tiles come last, where they even out the finish.

Three ways to deal the tiles out:
    STRIDE  program p takes p, p + n, p + 2n, ...: right when all tiles are equally long
    SNAKE   the same, every second round backwards: under a causal mask the program that got
            the longest of one round gets the shortest of the next
    TICKET  whoever is free draws the next number from a counter in global memory; the producer
            draws it a tile ahead and hands it to the consumers through shared memory
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

STRIDE = gl.constexpr(0)
SNAKE = gl.constexpr(1)
TICKET = gl.constexpr(2)


@gluon.jit
def tile_at(position, n_tiles, n_heads, chunk):
    """(rank of the tile in its head, head) that stand at `position`."""
    group = position // (chunk * n_tiles)
    at = position - group * chunk * n_tiles
    width = gl.minimum(chunk, n_heads - group * chunk)  # the last group may have fewer heads
    rank = at // width
    return rank, group * chunk + at - rank * width


@gluon.jit
def dealt(turn, SCHEDULE: gl.constexpr):
    """The position of this program's tile number `turn`, without a counter."""
    me = gl.program_id(0)
    if SCHEDULE == SNAKE:
        if turn % 2 == 1:
            me = gl.num_programs(0) - 1 - me
    return turn * gl.num_programs(0) + me


@gluon.jit
def draw(counter_ptr, n_positions):
    """Draw the next position. Every program draws until it is past the end, so there are exactly
    `n_positions` draws, and the last one sets the counter back to 0 for the next launch."""
    number = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if number == n_positions - 1:
        gl.atomic_xchg(counter_ptr, 0, sem="relaxed")
    return number + gl.num_programs(0)


@gluon.jit
def publish(position, turn, ticket):
    """Producer: hand the position of tile `turn + 1` to the consumers."""
    slot, full, empty = ticket
    ONE_WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty, (turn & 1) ^ 1)
    slot.store(gl.full([1], position, gl.int32, ONE_WARP))
    mbarrier.arrive(full, count=1)


@gluon.jit
def following(turn, ticket, SCHEDULE: gl.constexpr):
    """Consumer: the position of tile `turn`, turn > 0."""
    if SCHEDULE == TICKET:
        slot, full, empty = ticket
        FOUR_WARPS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(full, (turn & 1) ^ 1)
        position = gl.max(slot.load(FOUR_WARPS), 0)
        mbarrier.arrive(empty, count=1)
        return position
    else:
        return dealt(turn, SCHEDULE)
