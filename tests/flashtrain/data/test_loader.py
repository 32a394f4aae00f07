import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtrain.data.dataset import RandomTokens
from flashtrain.data.loader import Batch, DataLoader
from flashtrain.data.mapped import DataError
from flashtrain.data.samples import Blocks, Shuffled
from flashtrain.data.shards import TokenShards
from tests.flashtrain.data.made import make_shards

T = 7
SIZES = {"batch_size": 8, "micro_batch_size": 2}


class Line:
    """Token i is i, so that a sample shows where it was read."""

    name = "a line of numbers"

    def __init__(self, tokens: int, vocabulary: int = 1 << 31) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary
        self.reads = 0

    def advise(self, start: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
        self.reads += 1
        assert 0 <= start <= start + length <= self.tokens
        return np.arange(start, start + length, dtype=np.uint32)


@contextmanager
def opened(dataset: Any, seed: int = 3, **changes: Any) -> Iterator[DataLoader]:
    """A loader over `dataset` shuffled; `validation` too may be a dataset."""
    if "validation" in changes:
        changes["validation"] = Blocks(changes["validation"], T)
    with DataLoader(Shuffled(Blocks(dataset, T), seed), **(SIZES | changes)) as loader:
        yield loader


def joined(batches: list[Batch]) -> Tensor:
    """[2, b, T]: tokens and labels of all micro-batches."""
    return torch.stack(
        [torch.cat([b.tokens for b in batches]), torch.cat([b.labels for b in batches])]
    )


def global_batch(dataset: Any, step: int, data_size: int, **changes: Any) -> Tensor:
    parts = []
    for rank in range(data_size):
        with opened(dataset, data_rank=rank, data_size=data_size, **changes) as loader:
            parts.append(joined(loader.step(step)))
    return torch.cat(parts, 1)


def test_batches_have_the_promised_form() -> None:
    with opened(Line(1000)) as loader:
        batches = loader.step(0)
    assert len(batches) == 4
    for tokens, labels, documents in batches:
        assert documents is None
        assert tokens.shape == labels.shape == (2, 7)
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.is_contiguous() and labels.is_contiguous()
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        assert torch.equal(labels, tokens + 1)
        assert (tokens[:, 0] % 7 == 0).all()


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("step", [0, 5])
def test_the_global_batch_does_not_depend_on_the_layout(step: int, micro_batch_size: int) -> None:
    alone = global_batch(Line(1000), step, 1)
    for data_size in (1, 2, 4):
        spread = global_batch(Line(1000), step, data_size, micro_batch_size=micro_batch_size)
        assert torch.equal(spread, alone)


def test_the_order_survives_a_change_of_layout_in_mid_epoch_and_the_epochs_end(
    tmp_path: Path,
) -> None:
    # 1000 tokens are 142 samples: steps 0 to 39 of 8 samples cross two epochs' ends inside a step
    shards = TokenShards(make_shards(tmp_path / "shards"))
    one = {"micro_batch_size": 1}
    with opened(shards, **one) as loader:
        whole = [joined(loader.step(step)) for step in range(40)]
    assert sorted((torch.cat(whole, 1)[0, :142, 0] // T).tolist()) == list(range(142))
    for data_size in (2, 4, 8):
        parts = []
        for rank in range(data_size):
            with opened(shards, data_rank=rank, data_size=data_size, **one) as loader:
                parts.append([joined(loader.step(step)) for step in range(40)])
        for step in range(40):
            assert torch.equal(torch.cat([part[step] for part in parts], 1), whole[step])
    # 1, 8, 2, 4 and 1 ranks in turn, each from where the last one stopped
    for data_size, steps in (
        (1, (0, 5)),
        (8, (5, 19)),
        (2, (19, 30)),
        (4, (30, 36)),
        (1, (36, 40)),
    ):
        for step in range(*steps):
            assert torch.equal(global_batch(shards, step, data_size, **one), whole[step])


def test_a_restart_at_any_step_goes_on_as_if_nothing_happened() -> None:
    with opened(Line(500)) as loader:
        whole = [joined(loader.step(step)) for step in range(20)]
    for first in (1, 7, 19):
        with opened(Line(500)) as loader:
            for step in range(first, 20):
                assert torch.equal(joined(loader.step(step)), whole[step])


def test_steps_come_in_any_order() -> None:
    order = [5, 6, 5, 5, 0, 1, 9, 2, 3, 4, 12, 11, 10, 13]
    with opened(Line(500)) as loader:
        jumping = {step: joined(loader.step(step)) for step in order}
    with opened(Line(500)) as loader:
        for step in range(14):
            expected = joined(loader.step(step))
            if step in jumping:
                assert torch.equal(jumping[step], expected)


def test_every_epoch_takes_each_sample_once_in_its_own_order() -> None:
    n_samples = 24  # 3 steps of 8
    with opened(Line(7 * n_samples + 1)) as loader:
        assert loader.samples.n_samples == n_samples
        epochs = []
        for epoch in range(4):
            firsts = [joined(loader.step(3 * epoch + i))[0, :, 0] for i in range(3)]
            epochs.append((torch.cat(firsts) // 7).tolist())
    assert all(sorted(epoch) == list(range(n_samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_span_epochs() -> None:
    with opened(Line(7 * 5 + 1)) as loader:  # 5 samples, 8 in a batch
        samples = torch.cat([joined(loader.step(step))[0, :, 0] for step in range(5)]) // 7
    for epoch in samples.reshape(8, 5).tolist():
        assert sorted(epoch) == list(range(5))


def test_seeds_change_the_order() -> None:
    assert not torch.equal(global_batch(Line(1000), 0, 1), global_batch(Line(1000), 0, 1, seed=4))


def test_shards_are_read_across_files(tmp_path: Path) -> None:
    # 1000 tokens in files of 300: samples 42, 85 and 128 lie on an end
    shards = TokenShards(make_shards(tmp_path / "shards"))
    for step in range(18):
        assert torch.equal(global_batch(shards, step, 2), global_batch(Line(1000), step, 2))


def test_random_tokens_load_too() -> None:
    with opened(RandomTokens(100, 1)) as loader:
        block = joined(loader.step(3))
    assert torch.equal(block[0, :, 1:], block[1, :, :-1])
    assert int(block.max()) < 100


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_evaluation_is_the_first_samples_on_every_layout(data_size: int) -> None:
    found = []
    for rank in range(data_size):
        with opened(
            Line(1000), data_rank=rank, data_size=data_size, validation=Line(200)
        ) as loader:
            for _ in range(2):  # the same again
                batches = list(loader.evaluation(12))
            loader.step(0)
        assert all(len(batch.tokens) <= 2 for batch in batches)
        found.append(joined(batches))
    tokens = torch.cat(found, 1)[0]
    assert torch.equal(tokens, torch.arange(12 * 7).reshape(12, 7))


def test_reading_goes_on_in_the_background_and_stops_ahead() -> None:
    line = Line(1000)
    with opened(line) as loader:
        loader.step(0)
        limit = time.monotonic() + 10
        while line.reads < 3 * 8 and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.05)
        assert line.reads == 3 * 8  # the step taken and two ahead
        began = loader.data_time
        loader.step(1)
        assert loader.data_time - began < 0.05


def test_waiting_is_measured() -> None:
    class Slow(Line):
        def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
            time.sleep(0.01)
            return super().read(start, length)

    with opened(Slow(1000)) as loader:
        loader.step(0)
        assert loader.data_time >= 0.08


def test_errors_of_the_thread_surface_in_their_step() -> None:
    class Failing(Line):
        broken = True

        def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
            if self.broken and self.reads >= 2 * 8:
                raise OSError("the disk is gone")
            return super().read(start, length)

    failing = Failing(1000)
    with opened(failing) as loader:
        loader.step(0)
        loader.step(1)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                loader.step(2)
        failing.broken = False  # it is read anew when asked for anew
        assert torch.equal(joined(loader.step(2)), global_batch(Line(1000), 2, 1))


def test_close_ends_the_thread() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "data"]

    before = len(threads())
    loader = DataLoader(Shuffled(Blocks(Line(1000), T), 3), **SIZES)
    assert len(threads()) == before  # nothing runs before the first step is known
    loader.step(0)
    assert len(threads()) == before + 1
    loader.close()
    loader.close()
    assert len(threads()) == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.step(1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 7}, "batch_size=7 is not divisible by micro_batch_size=2 x 1 data ranks"),
        ({"data_size": 8}, "batch_size=8 is not divisible by micro_batch_size=2 x 8"),
        ({"data_rank": 2, "data_size": 2}, "data rank 2 is not one of 2"),
        ({"validation": Line(7)}, "has 7 tokens and one sequence needs 8"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence), opened(Line(1000), **changes):
        pass
    with pytest.raises(DataError, match="has 7 tokens and one sequence needs 8"):
        Blocks(Line(7), 7)


def test_evaluation_that_does_not_fit_is_refused() -> None:
    with opened(Line(1000)) as loader, pytest.raises(DataError, match="no validation data"):
        next(loader.evaluation(2))
    with opened(Line(1000), data_size=2, validation=Line(100)) as loader:
        with pytest.raises(DataError, match="3 evaluation sequences do not divide over 2"):
            next(loader.evaluation(3))
        with pytest.raises(DataError, match="a line of numbers holds 14 of 7 tokens"):
            next(loader.evaluation(16))


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu() -> None:
    with opened(Line(1000), device="cuda") as loader:
        for step in range(6):
            block = joined(loader.step(step))
            assert block.is_cuda
            assert torch.equal(block.cpu(), global_batch(Line(1000), step, 1))
        torch.cuda.set_sync_debug_mode("error")  # a copy that waits for the host would raise
        try:
            loader.step(6)
        finally:
            torch.cuda.set_sync_debug_mode("default")
