"""Which starts are of one job, and what lay in the run folder before it."""

import os
from pathlib import Path

import pytest

from flashtrain import job


def add(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def test_later_starts_know_what_lay_there_before_the_first(tmp_path: Path) -> None:
    add(tmp_path, 5)
    first = job.before(tmp_path, {"a", "b"})
    assert list(first) == ["step-00000005"]
    add(tmp_path, 10)
    assert job.before(tmp_path, {"b", "c"}) == first  # a was lost, c is its spare
    assert job.before(tmp_path, {"c", "d"}) == first
    assert list(job.before(tmp_path, {"e"})) == ["step-00000010", "step-00000005"]


def test_without_a_launcher_every_start_is_a_job(tmp_path: Path) -> None:
    add(tmp_path, 5)
    assert list(job.before(tmp_path, set())) == ["step-00000005"]
    add(tmp_path, 10)
    assert len(job.before(tmp_path, set())) == 2
    assert not (tmp_path / job.JOB).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"launchers": 1}', "null"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / job.JOB).write_text(text)
    assert job.before(tmp_path, {"a"}) == {}


def test_a_launcher_is_the_process_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert job.launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    name = job.launcher()
    assert name == job.launcher()
    assert name is not None and str(os.getppid()) in name.split()
