"""The run that bench_faults.py breaks, and the ways in which it does."""

import atexit
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashtrain.checkpoint.shelf import checkpoints
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.watch import children

TAIL = 8192  # bytes: some ten lines of metrics.jsonl
LIMIT = 180  # seconds for anything a run does by itself; longer is a hang
AGAIN = "flashtrain: restart "  # what the launcher says
NOT_SAVED = "training goes on and tries again"  # what a run says that cannot write a checkpoint


def make_tokens(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))


class Run:
    """One start after the other of one run, all by the same command."""

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
        atexit.register(lambda: self.goes_on() and self.kill_all())  # should the bench be ended

    def anew(self, name: str) -> "Run":
        """Another one from its seed, beside this one."""
        return Run(self.folder.parent / name, self.tokens, self.steps, self.every)

    def start(self, restarts: int = 0, wandb: "Silence | None" = None) -> None:
        """restarts: how often the launcher may start again by itself. wandb: its server."""
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


def kill_a_rank(run: Run, dice: random.Random) -> None:
    workers = run.workers()
    if workers:
        send(dice.choice(workers), signal.SIGKILL)
    run.wait()


def kill_a_rank_and_look_on(run: Run, dice: random.Random) -> None:
    """The launcher starts again by itself."""
    said = run.said()
    workers = run.workers()
    if workers:
        send(dice.choice(workers), signal.SIGKILL)
    if run.until(lambda: AGAIN in run.output(said)):
        run.began = time.time()


def kill_while_saving(run: Run, dice: random.Random) -> None:
    folder = run.folder / "checkpoints"
    if run.until(lambda: any(folder.glob("*.tmp"))):
        time.sleep(dice.uniform(0, 0.01))
        kill_a_rank(run, dice)


def kill_while_renaming(run: Run, dice: random.Random) -> None:
    """From the manifest, the last file, to the rename and the deletion of old ones."""
    folder = run.folder / "checkpoints"
    if run.until(lambda: any(folder.glob("*.tmp/manifest.json"))):
        time.sleep(dice.uniform(0, 0.005))
        run.kill_all()


def kill_everything(run: Run, dice: random.Random) -> None:
    run.kill_all()


def terminate(run: Run, dice: random.Random) -> None:
    assert run.process is not None
    send(run.process.pid, signal.SIGTERM)
    run.wait()


def damage(run: Run, dice: random.Random) -> None:
    """A bit flipped, a file cut or gone in the newest checkpoint, while the run is down."""
    run.kill_all()
    found = checkpoints(run.folder / "checkpoints")
    if len(found) < 2:
        return  # with no whole one left a run stops and asks, as it should
    path = dice.choice(sorted(found[0].iterdir()))
    content = bytearray(path.read_bytes())
    how = dice.choice(["flip", "cut", "delete"])
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    run.damaged.add(found[0].stat().st_ino)


def fill_the_disk(run: Run, dice: random.Random) -> None:
    """Room for a quarter of a checkpoint, until a save has failed; then there is room again.

    On the small disk of the benchmark. Without one, the kernel refuses to let the ranks' files
    grow beyond a limit, which is the same error to who writes, but for its number.
    """
    said = run.said()

    def failed() -> bool:
        return NOT_SAVED in run.output(said)

    if not run.until(lambda: bool(run.saved())):
        return
    files = [path.stat().st_size for path in checkpoints(run.folder / "checkpoints")[0].iterdir()]
    disk = run.folder.parent
    if os.path.ismount(disk):
        room = os.statvfs(disk)
        free = room.f_bavail * room.f_frsize
        filler = disk / "filler"
        try:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - sum(files) // 4))
            run.until(failed)
        finally:
            filler.unlink(missing_ok=True)
        return
    workers = run.workers()
    before = resource.prlimit(workers[0], resource.RLIMIT_FSIZE)
    for pid in workers:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(files) - 1, before[1]))
    run.until(failed)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


STARTING, RESUMING = "a rank killed while starting", "a rank killed while resuming"
RESTARTED, FULL = "a rank killed, launcher restarts", "disk full during a save"
SILENT = "W&B server says nothing"
KINDS = {
    "a rank killed": kill_a_rank,
    STARTING: kill_a_rank,
    RESUMING: kill_a_rank,
    RESTARTED: kill_a_rank_and_look_on,
    "a rank killed while saving": kill_while_saving,
    "all killed while renaming": kill_while_renaming,
    "all processes killed": kill_everything,
    "SIGTERM": terminate,
    "newest checkpoint damaged": damage,
    FULL: fill_the_disk,
    SILENT: kill_everything,
}
