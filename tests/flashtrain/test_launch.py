"""What a start refuses by itself, what it says at the end, how processes end."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flashtrain import launch
from flashtrain.launch import REFUSED, _what_next, main

ENDS = """
import atexit
from flashtrain.launch import leave
atexit.register(print, "what was to be done at the end")
print("the last line", end="")
leave(3)
"""


def test_leaving_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "the last linewhat was to be done at the end\n"


def test_a_run_folder_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    small = ["experiment=null", "data=random", "model.vocabulary=128", "tracking=quiet"]
    for folder in ("file", "file/run"):
        assert main(["--nproc", "1", *small, f"run_dir={tmp_path}/{folder}"]) == REFUSED
        said = capsys.readouterr().err
        assert said.startswith(f"flashtrain: run_dir={tmp_path}/{folder} cannot be written to (")
        assert said.count("\n") == 1


def test_the_next_commands_can_be_pasted_whatever_the_folder_is_called() -> None:
    lines = _what_next("runs/my run", "ROMEO: 'tis", ["run_dir=runs/my run"]).splitlines()
    said = {line[:9].strip(): shlex.split(line[9:]) for line in lines if not line.startswith("run")}
    assert said["sample"][-2:] == ["run=runs/my run", "prompt=ROMEO: 'tis"]
    assert "runs/my run" in said["curve"]
    assert "run_dir=runs/my run" in said["resume"]


@pytest.mark.parametrize("profiled", [True, False])
def test_under_a_profiler_the_process_is_taken_apart(
    profiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launch.PROFILED:
        monkeypatch.delenv(name, raising=False)
    if profiled:
        monkeypatch.setenv("CUDA_INJECTION64_PATH", "a library")
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(launch.atexit, "_run_exitfuncs", lambda: None)
    if profiled:
        with pytest.raises(SystemExit, match="3"):
            launch.leave(3)
    else:
        launch.leave(3)
    assert statuses == ([] if profiled else [3])


def test_a_reader_that_went_away_changes_no_status() -> None:
    code = "from flashtrain.launch import leave; print('nobody reads this'); leave(0)"
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    words = ["experiment=null", "data=random", "model.vocabulary=32", "trainer.steps=1"]
    words += ["tracking.wandb.mode=disabled", f"run_dir={tmp_path}"]
    assert launch.main(["--nproc", "1", *words]) == launch.REFUSED
    said = capsys.readouterr().err
    assert said.startswith(f"flashtrain: run_dir={tmp_path} cannot be written to (No space")
    assert said.count("\n") == 1


def test_a_restart_tells_the_workers_what_was_taken_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, told = [100.0], list[float]()

    def crash(*_: object) -> tuple[int, set[int]]:
        told.append(float(os.environ[launch.EARLIER_S]))
        now[0] += 30
        return launch.FAILED, {-9}

    monkeypatch.setenv(launch.EARLIER_S, "77")  # of another launcher
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(launch, "_torchrun", crash)
    assert launch._run(2, tmp_path / "config.json", tmp_path, 2) == launch.FAILED
    assert told == [0, 30, 60]
