"""Small real runs in processes of their own, for tests that break them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from flashtrain.checkpoint.shelf import checkpoints
from flashtrain.data.prepare import Recipe, prepare

LIMIT = 120  # seconds for anything a run does by itself; longer is a hang
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCH = [sys.executable, "-m", "flashtrain.launch"]
TRAIN = ["-m", "flashtrain.train"]


def make_tokens(folder: Path) -> Path:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))
    return folder / "tokens"


def settings(tokens: Path, run: Path, **changes: object) -> list[str]:
    """Overrides of a run with 9,264 parameters; keys of `changes` have __ for a dot."""
    values: dict[str, object] = {
        "data": "shards",
        "data.path": tokens,
        "data.sequence_length": 16,
        "data.batch_size": 4,
        "data.micro_batch_size": 2,
        "model.d_model": 16,
        "model.n_heads": 2,
        "model.n_layers": 1,
        "trainer.steps": 60,
        "trainer.log_every": 1,
        "trainer.evaluate_sequences": 2,
        "trainer.sample_tokens": 1,
        "checkpoint.every": 10,
        "tracking.wandb.mode": "disabled",
        "run_dir": run,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


class Process:
    """A launcher and its workers. Use it in a `with` block: nothing of it is left afterwards."""

    def __init__(self, command: Sequence[str], run: Path, log: Path, **environment: str) -> None:
        self.run, self.log = run, log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip
        self.seen: set[int] = set()  # every worker there ever was

    def workers(self) -> list[int]:
        """Living ones, oldest first."""
        found = children(self.process.pid)
        self.seen.update(found)
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"not within {LIMIT} s:\n{self.output()}"
            self.workers()
            time.sleep(0.05)

    def wait(self, limit: float = LIMIT) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {limit} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in {self.process.pid, *self.workers(), *self.seen}:
            if self.process.poll() is None or pid != self.process.pid:
                kill(pid, signal.SIGKILL)
        self.process.wait()


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rows(run: Path) -> list[dict[str, Any]]:
    """Logged steps."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in rows(run)]


def weights(run: Path) -> dict[str, str]:
    """Checksums of the tensor files of the newest checkpoint, by name."""
    newest = checkpoints(run / "checkpoints")[0]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {n: f["xxh3_128"] for n, f in files.items() if n.endswith(".safetensors")}
