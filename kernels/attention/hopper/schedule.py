"""Which tile a persistent program takes next, and in what order tiles stand.

Tiles of `chunk` heads stand together, longest row first, heads innermost: what the programs in
flight read then fits in L2, and the short tiles come last, where they even out the finish.

Whoever is free draws the next number from a counter in global memory; the producer draws it before
the consumers need it and hands it over through shared memory. Under a causal mask that made 641
TFLOP/s of 563 with one program per tile, and of 461 with every second round dealt backwards (one
H200, forward, D = 128, S = 4096). Under full masks all tiles are equally long, but some
multiprocessors are faster than others: drawing brings 2 to 3 % backward. The chained forward
(forward_chained.py) takes tiles in turn, p, p + n, p + 2n, ...: drawing brought it nothing at 1024
keys and more, and at 512, where a tile is soon over, it ran at 492 TFLOP/s, in turn at 547 the day
before (D = 128, in a CUDA graph).
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
def draw(counter_ptr):
    """Producer, some time before the next tile: ask for a number."""
    return gl.atomic_add(counter_ptr, 1, sem="relaxed")


@gluon.jit
def drawn(number, n_positions, turn, counter_ptr, ticket):
    """Producer, after it loaded the tile: the next position, told to the consumers.

    Every program draws until it is past the end, so the number of draws is known, and the last one
    sets the counter back to 0 for the next launch.
    """
    slots, full, empty = ticket
    ONE_WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if number == n_positions - 1:
        gl.atomic_xchg(counter_ptr, 0, sem="relaxed")
    position = number + gl.num_programs(0)
    mbarrier.wait(empty.index(0), (turn & 1) ^ 1)
    slots.index(0).store(gl.full([1], position, gl.int32, ONE_WARP))
    mbarrier.arrive(full.index(0), count=1)
    return position


@gluon.jit
def following(turn, ticket):
    """Consumer: the position of tile `turn`, after the one before."""
    slots, full, empty = ticket
    mbarrier.wait(full.index(0), (turn - 1) & 1)
    position = gl.max(slots.index(0).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(empty.index(0), count=1)
    return position
