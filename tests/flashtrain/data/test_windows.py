"""The order that needs few shards at a time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashtrain.data.dataset import Part
from flashtrain.data.loader import DataLoader
from flashtrain.data.mapped import DataError
from flashtrain.data.packing import PackedDocuments, open_plan
from flashtrain.data.samples import DOCUMENTS, TOKENS, Blocks
from flashtrain.data.shards import TokenShards
from flashtrain.data.windows import WindowShuffled
from tests.flashtrain.data.made import make_shards

T, LIMIT = 7, 100


class Noted(TokenShards):
    """Remembers what was said to be needed."""

    needs: tuple[tuple[list[int], list[int]], ...] = ()

    def need(self, now: Any, soon: Any) -> None:
        if not self.needs or self.needs[-1] != (now, soon):
            self.needs = (*self.needs, (now, soon))
        super().need(now, soon)


@pytest.fixture
def shards(tmp_path: Path) -> Noted:
    """9 files of 100 tokens, 14 sequences of 7 each, and one of 50 with 7."""
    return Noted(make_shards(tmp_path / "shards", 950, limit=LIMIT))


def ordered(shards: Any, window: int, seed: int = 3) -> WindowShuffled:
    return WindowShuffled(Blocks(shards, T, None, shards.sections), shards, seed, window)


def firsts(samples: Any, numbers: range, rows: int = 2) -> NDArray[np.int64]:
    block = np.empty((rows, len(numbers), T), np.int64)
    samples.fill(np.array(numbers), block)
    assert (np.diff(block[TOKENS], axis=1) == 1).all() and (block[1] == block[0] + 1).all()
    return block[TOKENS, :, 0]


@pytest.mark.parametrize("window", [1, 3, 4, 10, 64])
def test_every_epoch_takes_each_sequence_once_a_window_at_a_time(
    shards: Noted, window: int
) -> None:
    samples = ordered(shards, window)
    assert samples.n_samples == 9 * 14 + 7
    epochs = [firsts(samples, range(e * 133, (e + 1) * 133)) for e in range(3)]
    expected = [s * LIMIT + i * T for s in range(10) for i in range(14 if s < 9 else 7)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch.tolist()) == expected
        at = 0
        for w in range(-(-10 // window)):
            of_window = samples.shards(number, w)
            count = sum(14 if shard < 9 else 7 for shard in of_window)
            assert set((epoch[at : at + count] // LIMIT).tolist()) == set(of_window)
            assert len(of_window) == min(window, 10 - w * window)
            at += count
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    if window == 3:  # mixed within a window, not shard after shard
        assert len(set((epochs[0][:10] // LIMIT).tolist())) == 3


def test_positions_do_not_depend_on_how_they_are_asked_for(shards: Noted) -> None:
    whole = firsts(ordered(shards, 3), range(300))
    for step in (1, 13, 50):
        again = ordered(shards, 3)
        for at in range(0, 300, step):
            stop = min(at + step, 300)
            assert (firsts(again, range(at, stop)) == whole[at:stop]).all()
    assert not (firsts(ordered(shards, 3, seed=4), range(300)) == whole).all()


def test_what_is_needed_is_said_before_it_is_read(shards: Noted) -> None:
    samples = ordered(shards, 4)
    firsts(samples, range(2 * 133))
    expected = [samples.shards(epoch, w) for epoch in range(3) for w in range(3)][:7]
    assert shards.needs == tuple(pairwise(expected))


def test_the_global_batch_is_the_same_on_every_layout_across_epochs(shards: Noted) -> None:
    def parts(step: int, data_size: int) -> torch.Tensor:
        found = []
        for rank in range(data_size):
            with DataLoader(
                ordered(shards, 3), batch_size=16, micro_batch_size=2, data_rank=rank,
                data_size=data_size,
            ) as loader:  # fmt: skip
                found += [batch.tokens for batch in loader.step(step)]
        return torch.cat(found)

    with DataLoader(ordered(shards, 3), batch_size=16, micro_batch_size=2) as loader:
        whole = [torch.cat([b.tokens for b in loader.step(step)]) for step in range(20)]
    for step in (0, 3, 7, 8, 16, 19):  # 133 and 266 sequences end an epoch inside 8 and 16
        for data_size in (1, 2, 4, 8):
            assert torch.equal(parts(step, data_size), whole[step])


def test_a_part_has_the_shards_it_cuts(shards: Noted) -> None:
    part = Part(shards, 0, 330)
    assert part.sections[:4] == [(0, 100), (100, 200), (200, 300), (300, 330)]
    assert set(part.sections[4:]) == {(330, 330)}
    samples = ordered(part, 2)
    assert samples.n_samples == 3 * 14 + 4
    found = sorted(firsts(samples, range(46)).tolist())
    assert found == sorted(s * 100 + i * T for s in range(4) for i in range(14 if s < 3 else 4))
    later = Part(shards, 150, 330)
    assert later.sections[1:4] == [(0, 50), (50, 150), (150, 180)]
    tiny = Part(shards, 50, 150)
    with pytest.raises(DataError, match=r"no shard of .* holds a sequence of 60 tokens"):
        WindowShuffled(Blocks(tiny, 60, None, tiny.sections), tiny, 1, 1)


def test_packed_documents_stay_within_their_shard(tmp_path: Path) -> None:
    shards = TokenShards(make_shards(tmp_path / "shards", 950, limit=LIMIT, vocabulary=13))
    plan = open_plan(shards, T, 0, tmp_path / "plans", shards.sections)
    assert len(plan.counts) == 10 and plan.counts.sum() == len(plan.rows) - 1
    packed = PackedDocuments(shards, T, 0, plan)
    samples = WindowShuffled(packed, shards, 5, 2)
    block = np.empty((3, samples.n_samples, T), np.int64)
    samples.fill(np.arange(samples.n_samples), block)
    learned = int((block[1] != -100).sum())
    assert learned == 950 - 10  # all but the last token of each shard has a label
    assert (np.diff(block[DOCUMENTS], axis=1) >= 0).all()
    again = open_plan(shards, T, 0, tmp_path / "plans", shards.sections)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    whole = open_plan(shards, T, 0, tmp_path / "plans")
    assert whole.counts.tolist() == [len(whole.rows) - 1]
