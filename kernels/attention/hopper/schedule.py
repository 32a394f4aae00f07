"""Which tile a persistent program takes next, and in what order tiles stand.

Tiles of `chunk` heads stand together, longest row first, heads innermost: what the programs in
flight read then fits in L2, and the short tiles come last, where they even out the finish.

Two ways to deal the tiles out (DRAW in the kernels):
    False   program p takes p, p + n, p + 2n, ...: right when all tiles are equally long
    True    whoever is free draws the next number from a counter in global memory; the producer
            draws it before the consumers need it and hands it over through shared memory. Under a
            causal mask that made 641 TFLOP/s of 563 with one program per tile, and of 461 with
            every second round dealt backwards (one H200, forward, D = 128, S = 4096)
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def tile_at(position, n_tiles, n_heads, chunk):
    """(rank of the tile in its head, head) that stand at `position`."""
    group = position // (chunk * n_tiles)
    at = position - group * chunk * n_tiles
    width = gl.minimum(chunk, n_heads - group * chunk)  # the last group may have fewer heads
    rank = at // width
    return rank, group * chunk + at - rank * width


@gluon.jit
def draw(counter_ptr, DRAW: gl.constexpr):
    """Producer, some time before the next tile: ask for a number."""
    number = 0
    if DRAW:
        number = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    return number


@gluon.jit
def drawn(
    number, position, n_positions, turn, counter_ptr, ticket, DRAW: gl.constexpr,
    DEPTH: gl.constexpr = 1, FIRST: gl.constexpr = 0,
):  # fmt: skip
    """Producer, after it loaded the tile: the next position, told to the consumers.

    Every program draws until it is past the end, so the number of draws is known, and the last one
    sets the counter back to 0 for the next launch. FIRST is 1 where the first tiles are drawn too.
    """
    if DRAW:
        programs = gl.num_programs(0)
        if number == n_positions - 1 + FIRST * programs:
            gl.atomic_xchg(counter_ptr, 0, sem="relaxed")
        position = number + (1 - FIRST) * programs
        _publish(position, turn + FIRST, ticket, DEPTH)
    else:
        position += gl.num_programs(0)
    return position


@gluon.jit
def first_drawn(n_positions, counter_ptr, ticket, DEPTH: gl.constexpr):
    """Producer: the first position, where it is drawn too. Programs that have not started have no
    tile then, so that nobody waits for one of theirs."""
    number = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    return drawn(number, 0, n_positions, -1, counter_ptr, ticket, True, DEPTH, 1)


@gluon.jit
def _publish(position, number, ticket, DEPTH: gl.constexpr):
    """Producer: hand a position to the consumers, the one with this number among those handed."""
    slots, full, empty = ticket
    ONE_WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    at = number % DEPTH
    mbarrier.wait(empty.index(at), ((number // DEPTH) & 1) ^ 1)
    slots.index(at).store(gl.full([1], position, gl.int32, ONE_WARP))
    mbarrier.arrive(full.index(at), count=1)


@gluon.jit
def following(
    position, turn, ticket, DRAW: gl.constexpr, DEPTH: gl.constexpr = 1, FIRST: gl.constexpr = 0,
    WARPS: gl.constexpr = 4, KEEP: gl.constexpr = False,
):  # fmt: skip
    """The position of tile `turn`, after the one before; KEEP: until `let_go`."""
    if DRAW:
        slots, full, empty = ticket
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        number = turn - 1 + FIRST
        at = number % DEPTH
        mbarrier.wait(full.index(at), (number // DEPTH) & 1)
        position = gl.max(slots.index(at).load(LAYOUT), 0)
        if not KEEP:
            mbarrier.arrive(empty.index(at), count=1)
    else:
        position += gl.num_programs(0)
    return position


@gluon.jit
def first_position(ticket, DRAW: gl.constexpr, DEPTH: gl.constexpr, FIRST: gl.constexpr):
    """Consumer: the position of its first tile."""
    position = gl.program_id(0)
    if FIRST:
        position = following(position, 0, ticket, DRAW, DEPTH, FIRST)
    return position


@gluon.jit
def let_go(turn, ticket, DEPTH: gl.constexpr):
    """The place of a kept ticket may be used again; FIRST was 1."""
    _slots, _full, empty = ticket
    mbarrier.arrive(empty.index(turn % DEPTH), count=1)
