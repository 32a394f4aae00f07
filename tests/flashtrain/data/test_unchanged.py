"""A run goes on only over the tokens it began with."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.mapped import DataError
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.source import sources_now
from flashtrain.data.unchanged import Unchanged
from flashtrain.door import admit
from flashtrain.hooks import Evaluate
from flashtrain.train import train
from flashtrain.trainer import Step
from tests.faults.runs import settings, steps

CPU = torch.device("cpu")


def tokens(folder: Path, animal: str) -> Path:
    """Shards of the same sizes whatever the animal."""
    text = "\n\n".join(f"the quick brown {animal} jumps over {n} lazy dogs" for n in range(300))
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / animal, Recipe("bytes", validation_share=0.2))
    return folder / animal


def config(data: Path, folder: Path, **changes: object) -> Config:
    changes = {"trainer__steps": 10, "checkpoint__every": 5, "parallel__tensor": 1} | changes
    return admit(load(settings(data, folder / "run", **changes)), 1, 1)


def put(there: Path, other: Path) -> None:
    shutil.rmtree(there)
    shutil.copytree(other, there)


def test_a_run_resumes_over_the_same_tokens_only(tmp_path: Path) -> None:
    fox, cat = tokens(tmp_path, "fox"), tokens(tmp_path, "cat")
    shutil.copytree(fox, tmp_path / "data")
    train(config(tmp_path / "data", tmp_path, trainer__stop_at=5), CPU)
    put(tmp_path / "data", cat)
    changed = config(tmp_path / "data", tmp_path)
    with pytest.raises(DataError, match=r"data holds other tokens than when .*step-00000005 was"):
        train(changed, CPU)
    train(config(cat, tmp_path, trainer__stop_at=6), CPU)  # named as other data: on purpose
    put(tmp_path / "data", fox)  # copied back: other times, other inodes, the same tokens
    train(config(tmp_path / "data", tmp_path), CPU)
    assert steps(tmp_path / "run") == list(range(1, 11))


def test_a_file_that_is_changed_meanwhile_ends_the_run_before_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tokens(tmp_path, "fox")
    (shard,) = data.glob("train*.bin")
    evaluate = Evaluate.after_step

    def meanwhile(hook: Evaluate, step: Step) -> None:
        if step.number == 7:
            # in its place: a file cut to nothing first would kill whoever is reading its mapping
            with shard.open("r+b") as file:
                file.seek(10)
                file.write(bytes(10))
        evaluate(hook, step)

    monkeypatch.setattr(Evaluate, "after_step", meanwhile)
    with pytest.raises(DataError, match=rf"{shard.name} was changed while a run reads it"):
        train(config(data, tmp_path), CPU)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("how", ["deleted", "replaced", "touched", "lengthened"])
def test_what_happens_to_a_file_is_seen(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(b"1234")
    sources = Unchanged()
    sources.add_foreign("a", [path])
    sources.refuse_changed()
    if how == "deleted":
        path.unlink()
    elif how == "replaced":
        shutil.copy2(path, other)
        os.replace(other, path)
    elif how == "touched":
        path.write_bytes(b"1235")
        os.utime(path, ns=(1, 1))
    else:
        path.write_bytes(b"12345678")
    with pytest.raises(DataError, match=r"a\.bin (is gone|was changed) while a run reads it"):
        sources.refuse_changed()


def test_random_tokens_and_raw_files(tmp_path: Path) -> None:
    made = load(["experiment=null", "data=random", "model.vocabulary=32", "trainer.steps=1"])
    assert sources_now(made).contents == {}
    path = tmp_path / "raw.bin"
    path.write_bytes(bytes(range(200)))
    raw = ["experiment=null", "data=shards", f"data.path={path}", "data.validation_tokens=20"]
    raw += ["model.vocabulary=65536", "trainer.steps=1"]
    before = sources_now(load(raw)).contents
    path.write_bytes(bytes(range(180)))
    with pytest.raises(DataError, match="other tokens"):
        sources_now(load(raw)).refuse_other(before, tmp_path)
