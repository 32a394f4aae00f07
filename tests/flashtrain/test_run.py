"""Claims about a run's folder: what lies there however it was saved, and whatever went wrong."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from flashtrain import checkpoint, door, job
from flashtrain.checkpoint import CheckpointError
from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.engine.native import NativeEngine
from flashtrain.hooks import Evaluate
from flashtrain.run import Run
from flashtrain.train import train
from flashtrain.trainer import Step, Trainer
from tests.harness import run_ranks

TINY = [
    "experiment=null", "data=random", "model.vocabulary=32", "model.d_model=16", "model.n_heads=2",
    "model.n_layers=1", "data.sequence_length=8", "data.batch_size=4", "precision=fp32",
    "attention=reference", "tracking=quiet", "tracking.wandb.mode=disabled",
    "trainer.evaluate_sequences=4", "trainer.log_every=1", "trainer.compile=false",
]  # fmt: skip


def run(folder: Path, *overrides: str, steps: int = 9, every: int = 3) -> Path:
    """Train, at most `steps` steps, and return the folder of the checkpoints."""
    config = load(
        [
            *TINY,
            f"trainer.steps={steps}",
            f"checkpoint.every={every}",
            f"trainer.evaluate_every={every}",
            f"run_dir={folder}",
            *overrides,
        ]
    )
    train(config, torch.device("cpu"))
    return folder / "checkpoints"


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def logged(folder: Path, key: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in lines if key in row]


def tensors(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def test_asynchronous_and_synchronous_runs_leave_the_same_checkpoints(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "checkpoint.asynchronous=true", "checkpoint.keep=9")
    two = run(tmp_path / "two", "checkpoint.asynchronous=false", "checkpoint.keep=9")
    assert steps(one) == steps(two) == [3, 6, 9]
    for path in one.iterdir():
        assert len(tensors(path)) == 1
        assert tensors(path) == tensors(two / path.name)
        generators = [(folder / path.name / "rng.json").read_bytes() for folder in (one, two)]
        assert generators[0] == generators[1]
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert len(logged(folder, "checkpoint/stall_s")) == 3
        assert len(logged(folder, "checkpoint/write_s")) == 3


def test_a_run_goes_on_from_what_was_saved_beside_it(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "trainer.stop_at=4")
    parts = run(tmp_path / "parts")
    assert steps(parts) == [6, 9]
    assert tensors(parts / "step-00000009") == tensors(whole / "step-00000009")


def test_newest_every_nth_and_best_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([4.0, 3.0, 5.0, 2.5, 6.0, 7.0, 8.0, float("nan")])
    monkeypatch.setattr(NativeEngine, "evaluate", lambda *_: torch.tensor(next(losses)))
    folder = run(
        tmp_path, "checkpoint.keep=1", "checkpoint.keep_best=1", "checkpoint.keep_every=9",
        steps=24,
    )  # fmt: skip
    assert steps(folder) == [9, 12, 18, 24]
    found = {step: checkpoint.read_meta(folder / f"step-{step:08d}") for step in steps(folder)}
    assert [found[step][checkpoint.EVALUATION] for step in (9, 12, 18, 24)] == [5.0, 2.5, 7.0, None]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path,
    asynchronous: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_at(monkeypatch, 6)
    folder = run(tmp_path, f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9")
    assert steps(folder) == [3, 9]
    (record,) = [r for r in caplog.records if "cannot write" in r.getMessage()]
    assert "step-00000006" in record.getMessage()
    assert "No space left on device" in record.getMessage()
    assert "training goes on" in record.getMessage()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_last_step_that_cannot_be_saved_is_an_error(
    tmp_path: Path, asynchronous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 9)
    with pytest.raises(CheckpointError, match=r"step-00000009.*No space left"):
        run(tmp_path, f"checkpoint.asynchronous={asynchronous}")
    assert steps(tmp_path / "checkpoints") == [3, 6]
    assert not (tmp_path / "ended.json").exists()


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    write = checkpoint.store.write_tensors

    def full(path: Path, *arguments: object) -> object:
        if path.parent.name == f"step-{step:08d}.tmp":
            raise OSError(28, "No space left on device", str(path))
        return write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.store, "write_tensors", full)


def test_a_full_disk_costs_the_files_of_a_start_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, "trainer.stop_at=3")
    before = (tmp_path / "config.json").read_text()
    write = Path.write_text

    def full(path: Path, *arguments: object, **others: object) -> int:
        if path.parent == tmp_path:
            path.touch()  # what a full disk allows
            raise OSError(28, "No space left on device", str(path))
        return write(path, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    folder = run(tmp_path)
    assert steps(folder) == [6, 9]
    assert (tmp_path / "config.json").read_text() == before
    said = [record.getMessage() for record in caplog.records]
    for name in ("config.json", "environment.json", "ended.json"):
        assert f"cannot write {tmp_path / name}: No space left on device" in said
    assert not list(tmp_path.glob("*.tmp"))


def test_an_error_does_not_cost_the_checkpoint_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Evaluate.after_step

    def break_down(hook: Evaluate, step: Step) -> None:
        if step.number == 4:
            raise RuntimeError("a cable was pulled")
        evaluate(hook, step)

    monkeypatch.setattr(Evaluate, "after_step", break_down)
    with pytest.raises(RuntimeError, match="cable"):
        run(tmp_path)
    assert steps(tmp_path / "checkpoints") == [3]


def test_going_back_waits_for_the_checkpoint_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after bad steps: `resume` finds what `save` began."""
    found: list[int] = []
    save = Run.save

    def save_and_go_back(self: Run, step: int, wait: bool = True) -> Path:
        path = save(self, step, wait)
        if step == 3:
            found.append(self.resume())
        return path

    monkeypatch.setattr(Run, "save", save_and_go_back)
    run(tmp_path)
    assert found == [3]


def test_copies_larger_than_the_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = [*TINY, "trainer.steps=1", "model.d_model=512", "model.n_layers=4"]  # 12.6 M parameters
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100 << 8}  # 100 MiB of memory
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    with pytest.raises(ConfigError, match=r"copies 0\.1 GiB.*set checkpoint\.asynchronous=false"):
        door._check_copy(load(line), 1)
    door._check_copy(load([*line, "checkpoint.asynchronous=false"]), 1)
    door._check_copy(load([*line, "parallel.shard=4", "data.batch_size=16"], 4), 2)  # half of it
    sizes["SC_PHYS_PAGES"] = 200 << 8
    door._check_copy(load(line), 1)


@pytest.mark.parametrize("from_path", [False, True])
def test_a_job_that_is_started_again_goes_on_from_what_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_path: bool
) -> None:
    """Wherever checkpoint.resume made it begin; a new command begins there again."""
    starts: list[int] = []
    fit = Trainer.fit

    def note(self: Trainer, start: int, end: int) -> None:
        starts.append(start)
        fit(self, start, end)

    monkeypatch.setattr(Trainer, "fit", note)
    folder = run(tmp_path, "trainer.stop_at=6", "checkpoint.keep=1")  # an earlier run
    resume = f"checkpoint.resume={folder / 'step-00000006' if from_path else 'never'}"
    begin = 6 if from_path else 0
    for stop in (begin + 5, 14):
        monkeypatch.setattr(job, "launcher", lambda: "a")
        run(tmp_path, resume, f"trainer.stop_at={stop}", "checkpoint.keep=1", steps=15)
    assert starts == [0, begin, begin + 5]
    if from_path:  # pushed out, which a job that goes on does not mind
        assert not (folder / "step-00000006").exists()
        door._check_files(load([*TINY, "trainer.steps=9", f"run_dir={tmp_path}", resume]))
    monkeypatch.setattr(job, "launcher", lambda: "b")
    if from_path:
        with pytest.raises(ConfigError, match="is not a checkpoint"):
            door._check_files(load([*TINY, "trainer.steps=9", f"run_dir={tmp_path}", resume]))
    else:
        run(tmp_path, resume, "trainer.stop_at=2", steps=15)
        assert starts[-1] == 0


def test_what_does_not_fit_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    run_ranks(check_refused_by_all, 2, tmp_path)


def check_refused_by_all() -> None:
    """As on a pipeline whose last rank alone has layers that the checkpoint lacks."""
    loaded: list[bool] = []
    one = Run.__new__(Run)
    one.peers = checkpoint.Peers(dist.group.WORLD)
    one.engine = SimpleNamespace(  # type: ignore[assignment]
        state=lambda saved: None, loaded=lambda: loaded.append(True)
    )

    def load(path: Path, state: object) -> None:
        if dist.get_rank() == 1:
            raise CheckpointError("no such layer")

    checkpoint.load = load
    with pytest.raises(CheckpointError, match="no such layer"):
        one._load(Path("step-00000004"))
    assert not loaded
