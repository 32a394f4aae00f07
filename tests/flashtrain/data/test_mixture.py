from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data.mapped import DataError
from flashtrain.data.mixture import LARGEST_SUM, Mix, Phase, phases, whole_weights

WEIGHTS = st.lists(st.sampled_from([0, 0.001, 0.1, 0.25, 1, 1.5, 3, 70]), min_size=1, max_size=9)


def mix_of(*weights: float) -> Mix:
    return Mix([Phase(0, weights)])


def walked(mix: Mix, n: int) -> tuple[list[int], list[int]]:
    """Source and its own number of the first `n` places, counted one after the other."""
    which = [int(mix.place(np.array([p]))[0][0]) for p in range(n)]
    counts: dict[int, int] = {}
    own = []
    for source in which:
        own.append(counts.get(source, 0))
        counts[source] = own[-1] + 1
    return which, own


@given(weights=WEIGHTS.filter(any), start=st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_counts_stay_beside_the_exact_share_everywhere(
    weights: Sequence[float], start: int
) -> None:
    mix, share = mix_of(*weights), np.array(whole_weights(weights)) / sum(whole_weights(weights))
    positions = np.arange(start, start + 200)
    counts = mix.counts(positions)
    assert (counts.sum(0) == positions).all()
    assert (np.abs(counts - share[:, None] * positions) <= 2.5).all()
    steps = np.diff(counts)
    assert ((steps == 0) | (steps == 1)).all()  # a place belongs to one source
    assert (counts[np.array(weights) == 0] == 0).all()


@given(weights=WEIGHTS.filter(any))
@settings(max_examples=40, deadline=None)
def test_any_place_is_what_counting_up_to_it_gives(weights: Sequence[float]) -> None:
    mix = mix_of(*weights)
    which, own = mix.place(np.arange(300))
    assert (which.tolist(), own.tolist()) == walked(mix, 300)


def test_ratios_are_exact_over_every_period() -> None:
    mix = mix_of(0.7, 0.2, 0.1)
    for start in (0, 10, 12345670):
        counts = mix.counts(np.array([start, start + 1000]))
        assert np.diff(counts)[:, 0].tolist() == [700, 200, 100]
    far = mix.counts(np.array([10**12]))[:, 0]
    assert far.tolist() == [7 * 10**11, 2 * 10**11, 10**11]
    thirds = mix_of(1, 1, 1).counts(np.array([3 * 10**11]))[:, 0]
    assert thirds.tolist() == [10**11] * 3


def test_a_small_batch_has_the_mix_too() -> None:
    which, _ = mix_of(3, 1).place(np.arange(4000))
    for batch in which.reshape(-1, 8):
        assert np.bincount(batch, minlength=2).tolist() == [6, 2]


def test_weights_change_where_they_are_told_to() -> None:
    found = phases(["a", "b", "c"], {"a": 1, "b": 1, "c": 0}, [(1001, {"a": 0, "c": 3})], 10)
    assert found == [Phase(0, (1, 1, 0)), Phase(101, (0, 1, 3))]
    mix = Mix([*found, Phase(501, (1, 0, 0))])
    which, own = mix.place(np.arange(1000))
    assert np.bincount(which[:100], minlength=3).tolist() == [50, 50, 0]
    assert np.bincount(which[101:501], minlength=3).tolist() == [0, 100, 300]
    assert set(which[501:].tolist()) == {0}
    assert (which.tolist(), own.tolist()) == walked(mix, 1000)  # every source goes on in its order
    assert (mix.place(np.array([[700, 5, 101]])[0])[0] == which[[700, 5, 101]]).all()


def test_decimals_are_taken_as_they_are_written() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([50, 100]) == [1, 2]
    assert whole_weights([1e-3, 1]) == [1, 1000]
    assert whole_weights([0, 2.5]) == [0, 1]


def test_a_mixture_that_does_not_repeat_ends_with_its_first_source() -> None:
    mix = mix_of(3, 1)
    n = mix.longest([30, 4])
    assert (mix.counts(np.array([n]))[:, 0] <= [30, 4]).all()
    assert (mix.counts(np.array([n + 1]))[:, 0] > [30, 4]).any()
    assert mix.longest([0, 0]) == 0


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1, -1], "must be numbers of 0 or more"),
        ([0, 0], "not all of them 0"),
        ([1, float("nan")], "must be numbers"),
        ([1, 1 / 3], f"{LARGEST_SUM:,} are counted exactly: round"),
    ],
)
def test_weights_without_a_meaning_are_refused(weights: list[float], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        mix_of(*weights)


def test_changes_without_a_meaning_are_refused() -> None:
    with pytest.raises(DataError, match="from token 5 on name d; the sources are a, b"):
        phases(["a", "b"], {"a": 1, "b": 1}, [(5, {"d": 1})], 10)
    with pytest.raises(DataError, match=r"samples \[5, 5\]: each change must come after"):
        Mix([Phase(0, (1, 1)), Phase(5, (1, 2)), Phase(5, (2, 1))])
