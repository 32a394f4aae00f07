"""Pieces fill a tensor exactly once, however it is cut, and that is seen quickly."""

import itertools
import random
import time

import pytest

from flashtrain.checkpoint.integrity import PieceRecord, TensorRecord, check_cover

SHAPE = (12, 10, 6)


def pieces(cuts: list[list[int]]) -> list[PieceRecord]:
    """A grid of boxes: per dimension, the places where it is cut."""
    spans = [list(itertools.pairwise(places)) for places in cuts]
    return [
        PieceRecord("f", "k", tuple(a for a, _ in box), tuple(b - a for a, b in box))
        for box in itertools.product(*spans)
    ]


def grid(dice: random.Random) -> list[PieceRecord]:
    return pieces([[0, *sorted(dice.sample(range(size), 2)), size] for size in SHAPE])


def check(found: list[PieceRecord], shape: tuple[int, ...] = SHAPE) -> None:
    check_cover("x", TensorRecord(shape, "float32", tuple(found)))


@pytest.mark.parametrize("seed", range(20))
def test_every_grid_is_a_cover_and_no_other_boxes_are(seed: int) -> None:
    dice = random.Random(seed)
    whole = [piece for piece in grid(dice) if 0 not in piece.shape]
    dice.shuffle(whole)
    check(whole)
    with pytest.raises(ValueError, match="a rank that owns a part did not write it"):
        check(whole[1:])
    # as many values as the whole, one of them twice and one not at all
    part = whole[0]
    moved = [
        PieceRecord("f", "k", tuple(offset), part.shape)
        for offset in itertools.product(
            *(range(size - n + 1) for size, n in zip(SHAPE, part.shape, strict=True))
        )
        if tuple(offset) != part.offset
    ]
    for other in dice.sample(moved, min(5, len(moved))):
        with pytest.raises(ValueError, match="two pieces hold the same values"):
            check([*whole[1:], other])


def test_scalars_and_tensors_without_values() -> None:
    check([PieceRecord("f", "k", (), ())], ())
    with pytest.raises(ValueError, match="did not write it or two ranks did"):
        check([PieceRecord("f", "k", (), ())] * 2, ())
    check([], (0, 3))
    check([PieceRecord("f", "k", (0, 0), (0, 3))], (0, 3))


def test_a_tensor_over_thousands_of_ranks_takes_no_time() -> None:
    """4,096 shards of 4 tensor ranks: each with each they are 134 million pairs."""
    found = pieces([list(range(4097)), [0, 8, 16, 24, 32]])
    began = time.perf_counter()
    check(found, (4096, 32))
    assert time.perf_counter() - began < 5
