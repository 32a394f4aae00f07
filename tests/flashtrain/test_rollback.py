"""Back to a checkpoint and on without the batches that did it, as if they had never been there."""

import os
from pathlib import Path

import pytest
import torch

from flashtrain import rollback
from flashtrain.checkpoint import store
from flashtrain.checkpoint.integrity import FileRecord
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.loader import Batch, DataLoader
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.door import admit
from flashtrain.engine.native import NativeEngine
from flashtrain.rollback import batch_of
from flashtrain.train import train
from flashtrain.trainer import TrainingError
from tests.faults.runs import steps, weights


@pytest.mark.parametrize("skipped", [[], [[3, 5]], [[3, 5], [7, 8]], [[7, 8], [0, 2]], [[2, 9]]])
def test_the_batches_of_all_steps_are_those_that_are_not_left_out(skipped: list[list[int]]) -> None:
    left = [n for n in range(40) if not any(first <= n < stop for first, stop in skipped)]
    assert [batch_of(step, skipped) for step in range(20)] == left[:20]


@pytest.mark.parametrize(
    "skipped", [[[3, 9], [3, 12]], [[3, 9], [1, 12]], [[5, 6], [2, 9], [4, 8]]]
)
def test_windows_may_overlap(skipped: list[list[int]]) -> None:
    """As they do when a run goes back further the second time."""
    test_the_batches_of_all_steps_are_those_that_are_not_left_out(skipped)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))
    return folder / "tokens"


def config(tokens: Path, folder: Path, *changes: str) -> Config:
    made = load(
        [
            "data=shards", f"data.path={tokens}", "data.sequence_length=16", "data.batch_size=4",
            "data.micro_batch_size=4",
            "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "parallel.tensor=1",
            "trainer.steps=24", "trainer.log_every=1", "trainer.evaluate_sequences=2",
            "trainer.sample_tokens=1", "checkpoint.every=5", "checkpoint.keep=9",
            "trainer.bad_steps=3", "trainer.on_bad_steps=rollback", "tracking.wandb.mode=disabled",
            f"run_dir={folder}", *changes,
        ]
    )  # fmt: skip
    return admit(made, 1, 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The global batches that were trained on, in order."""
    numbers: list[int] = []
    step = DataLoader.step

    def note(self: DataLoader, number: int) -> list[Batch]:
        numbers.append(number)
        return step(self, number)

    monkeypatch.setattr(DataLoader, "step", note)
    return numbers


def poison(monkeypatch: pytest.MonkeyPatch, asked: list[int], bad: set[int]) -> None:
    """Gradients of these batches are not finite."""
    forward_backward = NativeEngine.forward_backward

    def poisoned(self: NativeEngine, batches: list[Batch]) -> torch.Tensor:
        loss = forward_backward(self, batches)
        if asked[-1] in bad:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(NativeEngine, "forward_backward", poisoned)


CPU = torch.device("cpu")


def test_it_ends_as_a_run_that_never_saw_these_batches(
    tokens: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(rollback, "batch_of", lambda step, skipped: step + 5 * (step >= 10))
        train(config(tokens, tmp_path / "never"), CPU)
    wanted = [*range(10), *range(15, 29)]
    assert asked == wanted
    asked.clear()
    poison(monkeypatch, asked, {12, 13, 14})
    train(config(tokens, tmp_path / "run"), CPU)
    assert asked == [*range(15), *wanted[10:]]
    assert weights(tmp_path / "run") == weights(tmp_path / "never")
    assert steps(tmp_path / "run") == list(range(1, 25))

    # stopped and resumed, the list of what is left out comes with the checkpoint
    asked.clear()
    train(config(tokens, tmp_path / "parts", "trainer.stop_at=16"), CPU)
    train(config(tokens, tmp_path / "parts"), CPU)
    assert asked == [*range(15), *wanted[10:]]
    assert weights(tmp_path / "parts") == weights(tmp_path / "never")


def test_a_clock_that_was_set_back_hides_no_checkpoint(
    tokens: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_bytes

    def early(path: Path, content: bytes) -> FileRecord:
        record = write(path, content)
        os.utime(path, (1e9, 1e9))
        return record

    monkeypatch.setattr(store, "write_bytes", early)
    poison(monkeypatch, asked, {12, 13, 14})
    train(config(tokens, tmp_path), CPU)
    assert asked == [*range(15), *range(15, 29)]


def test_checkpoints_from_after_the_first_bad_step_are_set_aside(
    tokens: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, asked, {9, 10, 11})
    train(config(tokens, tmp_path), CPU)
    assert asked == [*range(12), *range(12, 31)]  # from step 5 on, batches 5 to 11 left out
    assert (tmp_path / "checkpoints" / "step-00000010.abandoned").is_dir()


def test_there_is_a_limit_and_there_must_be_a_checkpoint(
    tokens: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, asked, set(range(7, 100)))
    with pytest.raises(TrainingError, match=r"3 steps in a row; the run went back 2 times"):
        train(config(tokens, tmp_path / "a", "trainer.rollbacks=2"), CPU)
    with pytest.raises(TrainingError, match="no checkpoint of this run"):
        train(config(tokens, tmp_path / "b", "checkpoint.every=100"), CPU)
    # those of an earlier run in the same folder do not count
    with pytest.raises(TrainingError, match="no checkpoint of this run"):
        train(
            config(tokens, tmp_path / "a", "checkpoint.resume=never", "checkpoint.every=100"), CPU
        )
