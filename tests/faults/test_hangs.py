"""A run that can make no more steps ends, says where it stood, and leaves nothing behind."""

import json
import signal
import time
from pathlib import Path

import pytest

from flashtrain.launch import HUNG
from tests.faults import runs
from tests.faults.runs import LAUNCH, TORCHRUN, TRAIN, Process


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run_with_its_name(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = runs.settings(tokens, run, trainer__steps=100000, trainer__hang_timeout=0.1)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *TRAIN, *settings]
    with Process(command, run, tmp_path / "log") as process:
        process.until(lambda: len(runs.steps(run)) > 5)
        runs.kill(process.workers()[1], signal.SIGSTOP)
        began = time.monotonic()
        assert process.wait() == 1
        assert time.monotonic() - began < 60
        assert not any(map(runs.alive, process.seen))
    said = process.output()
    (line,) = [line for line in said.splitlines() if line.startswith("flashtrain: nothing has")]
    last = runs.steps(run)[-1]
    assert f"rank 0 at step {last + 1}, in gloo:" in line or f"what follows step {last}" in line
    assert "rank 1 dead, stopped" in line
    assert f"exitcode: {HUNG}" in said or f"exitcode  : {HUNG}" in said
    assert "in fit" in (run / "hangs" / "rank-00000.txt").read_text()
    record = json.loads((run / "hangs" / "rank-00000.collectives.json").read_text())
    assert any(entry["profiling_name"].startswith("gloo:") for entry in record["entries"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_dies_leaves_no_orphan(
    tokens: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    settings = runs.settings(tokens, run, trainer__steps=100000)
    command = [*LAUNCH, "--nproc", "2", "--max-restarts", "0", *settings]
    with Process(command, run, tmp_path / "log") as process:
        process.until(lambda: len(runs.steps(run)) > 5)
        runs.kill(process.workers()[0], number)
        assert process.wait(60) == 1
        assert not any(map(runs.alive, process.seen))


def test_workers_end_when_their_launcher_is_gone(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = runs.settings(tokens, run, trainer__steps=100000)
    with Process([*LAUNCH, "--nproc", "2", *settings], run, tmp_path / "log") as process:
        process.until(lambda: len(runs.steps(run)) > 5)
        workers = process.workers()
        runs.kill(process.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(map(runs.alive, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
