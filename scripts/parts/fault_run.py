"""The run that bench_faults.py breaks."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from flashtrain.checkpoint.shelf import checkpoints
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.watch import children

TAIL = 8192  # bytes: some ten lines of metrics.jsonl
LIMIT = 180  # seconds for anything a run does by itself; longer is a hang


def make_tokens(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))


class Run:
    """One start after the other of one run, all by the same command."""

    started: ClassVar[list["Run"]] = []
    ended: ClassVar[bool] = False  # the bench is at its end, and starts nothing any more

    @classmethod
    def end_all(cls) -> None:
        cls.ended = True
        for run in cls.started:
            if run.goes_on():
                run.kill_all()

    def __init__(self, folder: Path, tokens: Path, steps: int, every: int) -> None:
        self.folder, self.tokens, self.steps, self.every = folder, tokens, steps, every
        self.overrides = [
            "data=shards", f"data.path={tokens}", "data.sequence_length=32", "data.batch_size=4",
            "data.micro_batch_size=2", "model.d_model=32", "model.n_heads=2", "model.n_layers=2",
            f"trainer.steps={steps}", "trainer.log_every=1", "trainer.evaluate_sequences=2",
            f"trainer.evaluate_every={steps}", "trainer.sample_tokens=1", "parallel=tensor2",
            f"checkpoint.every={every}", "checkpoint.keep=3", f"run_dir={folder}",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0  # wall clock of the latest start
        self.damaged: set[int] = set()  # inodes of checkpoints that `damage` has touched

    def anew(self, name: str) -> "Run":
        """Another one from its seed, beside this one."""
        return Run(self.folder.parent / name, self.tokens, self.steps, self.every)

    def start(self, restarts: int = 0, wandb: "Silence | None" = None) -> None:
        """restarts: how often the launcher may start again by itself. wandb: its server."""
        if Run.ended:
            raise SystemExit(1)
        Run.started.append(self)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        mode = "disabled" if wandb is None else "online"
        command = [
            sys.executable, "-m", "flashtrain.launch", "--nproc", "2", "--max-restarts",
            str(restarts), *self.overrides, f"tracking.wandb.mode={mode}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if wandb is not None:
            environment |= {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": "0" * 40}
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def goes_on(self) -> bool:
        """Whether the latest start has not ended."""
        return self.process is not None and self.process.poll() is None

    def wait(self) -> int:
        """The exit status, within LIMIT."""
        assert self.process is not None
        return self.process.wait(LIMIT)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true while the run went on, within LIMIT."""
        deadline = time.monotonic() + LIMIT
        while self.goes_on():
            if condition():
                return True
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.folder), LIMIT)
            time.sleep(0.002)
        return False

    def workers(self) -> list[int]:
        assert self.process is not None
        return children(self.process.pid)

    def kill_all(self) -> None:
        """Everything at once, as when a machine loses power."""
        assert self.process is not None
        workers = self.workers()
        for pid in (self.process.pid, *workers):
            send(pid, signal.SIGKILL)
        self.process.wait()
        while any(map(lives, workers)):  # one may be in the middle of a rename
            time.sleep(0.002)

    def rows(self) -> list[dict[str, Any]]:
        """Logged steps: each once, those after a resumed step cut away by the start."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        return [row for row in map(json.loads, filter(None, lines)) if "train/loss" in row]

    def latest(self) -> dict[str, Any] | None:
        """The last logged step; reads the end of the file only, for it is asked all the time."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return None
        for line in reversed(lines):
            if b'"train/loss"' in line and line.startswith(b"{"):
                row: dict[str, Any] = json.loads(line)
                return row
        return None

    def reached(self) -> int:
        row = self.latest()
        return 0 if row is None else int(row["step"])

    def stepped(self) -> bool:
        """Whether the latest start has logged a step."""
        row = self.latest()
        return row is not None and row["time"] > self.began

    def new_steps(self) -> list[int]:
        """Steps logged by the latest start."""
        return [int(row["step"]) for row in self.rows() if row["time"] > self.began]

    def saved(self) -> list[int]:
        """Steps of the checkpoints, newest first."""
        found = checkpoints(self.folder / "checkpoints")
        return [int(path.name.removeprefix("step-")) for path in found]

    def output(self, start: int = 0) -> str:
        """What all starts have said, from this byte on."""
        with (self.folder / "output.txt").open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def said(self) -> int:
        """Bytes up to now."""
        return (self.folder / "output.txt").stat().st_size

    def contents(self) -> dict[str, str]:
        """Checksums of the tensor files of the newest checkpoint."""
        newest = checkpoints(self.folder / "checkpoints")[0]
        files = json.loads((newest / "manifest.json").read_text())["files"]
        return {n: f["xxh3_128"] for n, f in files.items() if n.endswith(".safetensors")}


atexit.register(Run.end_all)


class Silence:
    """A server that accepts every connection and never says a word."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.callers: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.callers.append(self.socket.accept()[0])


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
