"""A rank that is killed costs the steps since the newest checkpoint, and nobody has to come."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashtrain.claim import LOCK, claim
from flashtrain.config import ConfigError
from tests.faults import runs
from tests.faults.runs import LAUNCH, TORCHRUN, TRAIN, Process, free_port


def undisturbed(tokens: Path, folder: Path) -> dict[str, str]:
    run = folder / "undisturbed"
    command = [*LAUNCH, "--nproc", "2", *runs.settings(tokens, run)]
    with Process(command, run, folder / "undisturbed.log") as process:
        assert process.wait() == 0, process.output()
    return runs.weights(run)


def kill_after(process: Process, step: int) -> None:
    """SIGKILL to the second of two workers once `step` is logged."""
    process.until(lambda: max(runs.steps(process.run), default=0) >= step)
    runs.kill(process.workers()[1], signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_restarts_a_job_over_the_same_store_and_no_number_changes(
    tokens: Path, tmp_path: Path
) -> None:
    """With a static address torchrun keeps its store, and what dead ranks left in it."""
    run = tmp_path / "run"
    command = [
        *TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "--max-restarts=2",
        *TRAIN, *runs.settings(tokens, run),
    ]  # fmt: skip
    with Process(command, run, tmp_path / "log") as process:
        kill_after(process, 15)
        process.until(lambda: process.output().count("resumes from") == 1)
        kill_after(process, 35)
        assert process.wait() == 0, process.output()
    assert process.output().count("resumes from") == 2
    assert runs.steps(run) == list(range(1, 61))
    assert runs.weights(run) == undisturbed(tokens, tmp_path)


@pytest.mark.slow
def test_train_sh_restarts_by_itself(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*LAUNCH, "--nproc", "2", *runs.settings(tokens, run)]
    with Process(command, run, tmp_path / "log") as process:
        kill_after(process, 15)
        assert process.wait() == 0, process.output()
        assert not any(map(runs.alive, process.seen))
    assert "flashtrain: restart 1 of 3" in process.output()
    assert runs.steps(run) == list(range(1, 61))


@pytest.mark.slow
def test_a_node_joins_and_is_lost_and_the_run_goes_on(tokens: Path, tmp_path: Path) -> None:
    """One node, then two, then one: the global batch and the order of the data stay."""
    run, port = tmp_path / "run", free_port()
    settings = runs.settings(tokens, run, trainer__steps=100000, **{"data.micro_batch_size": 1})
    command = [
        *TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=5", "--monitor-interval=0.1",
        "--rdzv-conf=keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=2",
        *TRAIN, *settings, "parallel=auto",
    ]  # fmt: skip
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch.sh says, and why
    with Process(command, run, tmp_path / "first.log", **apart) as first:
        first.until(lambda: "1 processes:" in first.output() and len(runs.steps(run)) > 15)
        with Process(command, run, tmp_path / "second.log", **apart) as second:
            first.until(lambda: "2 processes:" in first.output() + second.output())
            here = len(runs.steps(run))
            first.until(lambda: len(runs.steps(run)) > here + 15)
            assert "SIGTERM: saved step" in first.output()  # nothing was trained twice for it
        seen = len(first.output())
        first.until(lambda: "1 processes:" in first.output()[seen:])
        here = len(runs.steps(run))
        first.until(lambda: len(runs.steps(run)) > here + 15)
    done = runs.steps(run)
    assert done == list(range(1, len(done) + 1))


def test_a_folder_that_cannot_be_written_to_is_refused_at_start(tmp_path: Path) -> None:
    """Which root can write to, whatever its permissions say: a disk mounted read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a disk")
    try:
        for run in (disk, disk / "run"):
            with pytest.raises(ConfigError, match=f"run_dir={run} cannot be written to"):
                claim(run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_same_command_twice_at_once_is_refused(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = "import sys, time; from pathlib import Path; from flashtrain.claim import claim; "
    holder += "claim(Path(sys.argv[1])); time.sleep(100)"
    with Process([sys.executable, "-c", holder, str(run)], run, tmp_path / "log") as process:
        process.until(lambda: (run / LOCK).exists() and "process" in (run / LOCK).read_text())
        with pytest.raises(ConfigError, match=f"in use by process {process.process.pid} on"):
            claim(run, patience=0.3)
    claim(run, patience=5)  # it went with the process
