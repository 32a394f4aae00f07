"""What torchrun does with workers that were refused, and with those that died: real processes."""

import os
import subprocess
from pathlib import Path

from flashtrain.launch import FAILED, REFUSED
from tests.faults.runs import ELASTIC, Process, free_port

# notes its start, and ends with the status of its rank; one that is told 0 waits to be ended
WORKER = """
import os, sys, time
rank = int(os.environ["RANK"])
with open(sys.argv[1], "a") as file:
    file.write(f"{rank}\\n")
status = int(sys.argv[2 + rank])
time.sleep(0 if status else 100)
sys.exit(status)
"""


def start(folder: Path, statuses: list[int]) -> tuple[int, list[str], str]:
    """(exit status, ranks in the order of their starts, what was said)."""
    (folder / "worker.py").write_text(WORKER)
    started = folder / "started"
    run = subprocess.run(
        [
            *ELASTIC, "--standalone", f"--nproc-per-node={len(statuses)}", "--max-restarts=2",
            folder / "worker.py", started, *map(str, statuses),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return run.returncode, started.read_text().split(), run.stderr


def test_a_refused_worker_is_not_started_again(tmp_path: Path) -> None:
    status, started, said = start(tmp_path, [0, REFUSED])
    assert status == REFUSED, said
    assert sorted(started) == ["0", "1"]
    assert "Traceback" not in said


def test_one_that_died_is(tmp_path: Path) -> None:
    status, started, said = start(tmp_path, [FAILED])
    assert status == FAILED
    assert started == ["0"] * 3
    assert "ChildFailedError" in said  # torchrun's own report


def test_the_other_machines_do_not_start_again_either(tmp_path: Path) -> None:
    """Theirs die when they miss the refused one; the run is over, which one line says."""
    (tmp_path / "worker.py").write_text(
        "import sys, time\n"
        "time.sleep(1 if sys.argv[1] == '2' else 4)\n"  # the refused one ends first
        "sys.exit(int(sys.argv[1]))\n"
    )
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [*ELASTIC, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous]
    command += ["--rdzv-id=test", str(tmp_path / "worker.py")]
    with (
        Process([*command, str(FAILED)], tmp_path, tmp_path / "first.log") as first,
        Process([*command, str(REFUSED)], tmp_path, tmp_path / "second.log") as second,
    ):
        assert second.wait() == REFUSED, second.output()
        assert first.wait() == FAILED, first.output()
    assert first.output().count("flashtrain: ") == 1 and "Traceback" not in first.output()
    assert first.output().splitlines()[-1].startswith("flashtrain: the machines of this run do not")
