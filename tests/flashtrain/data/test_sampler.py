import numpy as np
import pytest

from flashtrain.data.sampler import sample_index

SIZES = [*range(1, 40), 63, 64, 65, 100, 1000, 4095, 4096, 4097, 65537]


def epochs(seed: int, n_samples: int, n_epochs: int = 1) -> np.ndarray:
    """[n_epochs, n_samples]"""
    positions = np.arange(n_epochs * n_samples)
    return sample_index(seed, positions, n_samples).reshape(n_epochs, n_samples)


@pytest.mark.parametrize("n_samples", SIZES)
def test_every_epoch_takes_each_sample_once(n_samples: int) -> None:
    for epoch in epochs(3, n_samples, 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n_samples))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = np.concatenate([epochs(seed, 1000, 4) for seed in (0, 1, 2, -1, 2**64 + 3)])
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # two independent orders agree in one place on average
            assert (one == other).sum() < 10


def test_one_position_is_what_the_array_says() -> None:
    together = epochs(9, 77, 3).reshape(-1)
    alone = [sample_index(9, position, 77) for position in range(3 * 77)]
    assert all(type(index) is int for index in alone)
    np.testing.assert_array_equal(together, alone)


def test_an_array_keeps_its_shape() -> None:
    positions = np.arange(24).reshape(2, 3, 4)
    assert sample_index(1, positions, 10).shape == (2, 3, 4)
    assert sample_index(1, positions[:0], 10).shape == (0, 3, 4)


def test_far_positions_of_large_data_stay_in_range() -> None:
    n_samples = 10**12 + 39
    index = sample_index(5, np.arange(10**15, 10**15 + 1000), n_samples)
    assert index.min() >= 0
    assert index.max() < n_samples
    assert len(np.unique(index)) == 1000


@pytest.mark.parametrize("n_samples", [2, 3, 5, 8, 12, 50])
def test_every_sample_is_as_likely_at_every_place(n_samples: int) -> None:
    trials = 500
    orders = np.stack([epochs(seed, n_samples)[0] for seed in range(trials)])
    expected = trials / n_samples
    counts = np.stack([np.bincount(column, minlength=n_samples) for column in orders.T])
    freedom = (n_samples - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # mean `freedom`, variance twice that: 5 standard deviations
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_not_read_one_after_the_other() -> None:
    order = epochs(1, 10_000)[0]
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected of a random order
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_impossible_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="n_samples=0"):
        sample_index(1, 0, 0)
    with pytest.raises(ValueError, match="position -3 is negative"):
        sample_index(1, -3, 5)


def test_the_order_is_the_same_in_every_version() -> None:
    # a run resumed under a later version must see the data it would have seen
    assert sample_index(1337, np.arange(8), 1000).tolist() == [80, 46, 118, 370, 22, 652, 818, 573]
