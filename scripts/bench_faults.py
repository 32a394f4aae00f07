"""Breaks a small run again and again, starts it with the same command, and counts what was lost.

    python scripts/bench_faults.py                        # 12 faults, a few minutes on two cores
    python scripts/bench_faults.py --faults 200 --seed 1 --json faults.json

Two processes on the CPU. A fault falls at a random moment; the next start must go on, without help,
from the newest checkpoint that is whole. Every run ends undisturbed, and its weights and optimizer
must then be bit for bit those of a run that saw no fault. Exit status 1 if any of this fails.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashtrain.checkpoint.shelf import checkpoints
from flashtrain.data.prepare import Recipe, prepare

LIMIT = 180  # seconds for anything a run does by itself; longer is a hang
STARTING = 8.0  # seconds after a start within which a rank is killed `while starting`


class Run:
    """One start after the other of one run, all by the same command."""

    def __init__(self, folder: Path, tokens: Path, steps: int, every: int) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.command = [
            sys.executable, "-m", "flashtrain.launch", "--nproc", "2", "data=shards",
            f"data.path={tokens}", "data.sequence_length=32", "data.batch_size=4",
            "data.micro_batch_size=2", "model.d_model=32", "model.n_heads=2", "model.n_layers=2",
            f"trainer.steps={steps}", "trainer.log_every=1", "trainer.evaluate_sequences=2",
            f"trainer.evaluate_every={steps}", "trainer.sample_tokens=1", "parallel=tensor2",
            f"checkpoint.every={every}", "checkpoint.keep=3", "tracking.wandb.mode=disabled",
            f"run_dir={folder}",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0  # wall clock of the latest start
        self.damaged: set[int] = set()  # inodes of checkpoints that `damage` has touched

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait(self) -> int:
        """The exit status, within LIMIT."""
        assert self.process is not None
        return self.process.wait(LIMIT)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true while the run went on, within LIMIT."""
        assert self.process is not None
        deadline = time.monotonic() + LIMIT
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.command, LIMIT)
            time.sleep(0.002)
        return False

    def workers(self) -> list[int]:
        assert self.process is not None
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
            if parent == self.process.pid:
                found.append(int(path.parent.name))
        return found

    def kill_all(self) -> None:
        """Everything at once, as when a machine loses power."""
        assert self.process is not None
        for pid in (self.process.pid, *self.workers()):
            send(pid, signal.SIGKILL)
        self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """Logged steps: each once, those after a resumed step cut away by the start."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    def reached(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def new_steps(self) -> list[int]:
        """Steps logged by the latest start."""
        return [int(row["step"]) for row in self.rows() if row["time"] > self.began]

    def saved(self) -> list[int]:
        """Steps of the checkpoints, newest first."""
        found = checkpoints(self.folder / "checkpoints")
        return [int(path.name.removeprefix("step-")) for path in found]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def contents(self) -> dict[str, str]:
        """Checksums of the tensor files of the newest checkpoint."""
        newest = checkpoints(self.folder / "checkpoints")[0]
        files = json.loads((newest / "manifest.json").read_text())["files"]
        return {n: f["xxh3_128"] for n, f in files.items() if n.endswith(".safetensors")}


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def kill_a_rank(run: Run, dice: random.Random) -> None:
    workers = run.workers()
    if workers:
        send(dice.choice(workers), signal.SIGKILL)
    run.wait()


def kill_while_saving(run: Run, dice: random.Random) -> None:
    folder = run.folder / "checkpoints"
    if run.until(lambda: any(folder.glob("*.tmp"))):
        time.sleep(dice.uniform(0, 0.01))
        kill_a_rank(run, dice)


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


KINDS = {
    "a rank killed": kill_a_rank,
    "a rank killed while starting": kill_a_rank,
    "a rank killed while saving": kill_while_saving,
    "all processes killed": kill_everything,
    "SIGTERM": terminate,
    "newest checkpoint damaged": damage,
}


@dataclass
class Tally:
    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    redone: list[int] = field(default_factory=list)  # steps trained twice, per fault but SIGTERM
    recovery_s: list[float] = field(default_factory=list)  # from a start to its first step
    stopping_s: list[float] = field(default_factory=list)  # from SIGTERM to the end
    runs: int = 0
    equal: int = 0  # runs whose end is bit for bit that of the undisturbed one


@dataclass
class Expected:
    """What the next start must do."""

    kind: str
    step: int  # it goes on from here
    reached: int  # the fault came after this one


def whole(run: Run) -> int:
    """The step of the newest checkpoint that no fault has touched; 0: from the seed."""
    found = checkpoints(run.folder / "checkpoints")
    steps = [p.name.removeprefix("step-") for p in found if p.stat().st_ino not in run.damaged]
    return int(steps[0]) if steps else 0


def resumed(run: Run, tally: Tally, expected: Expected | None) -> bool:
    """Wait for the first step of this start and judge the fault before; False: it ended."""
    began = time.monotonic()
    if not run.until(lambda: bool(run.new_steps())):
        return False
    tally.recovery_s.append(time.monotonic() - began)
    if expected is not None:
        came_back = run.new_steps()[0] - 1
        if came_back == expected.step:
            tally.survived[expected.kind] += 1
        else:
            print(f"lost: {expected}, and the run went on from step {came_back}", flush=True)
        if expected.kind != "SIGTERM":
            tally.redone.append(expected.reached - came_back)
    return True


def disturb(run: Run, kind: str, dice: random.Random, tally: Tally) -> Expected:
    """Break a run that trains, or that starts."""
    if kind != "a rank killed while starting":
        target = run.reached() + dice.randrange(run.every)
        run.until(lambda: run.reached() >= target)
    began = time.monotonic()
    tally.injected[kind] += 1
    KINDS[kind](run, dice)
    if kind == "SIGTERM":
        tally.stopping_s.append(time.monotonic() - began)
    reached, step = run.reached(), whole(run)
    return Expected(kind, reached if kind == "SIGTERM" else step, reached)


def still_starting(run: Run, dice: random.Random) -> bool:
    """Wait a random while, and until there are ranks; whether none has made a step by then."""
    moment = time.monotonic() + dice.uniform(0, STARTING)
    there = run.until(
        lambda: bool(run.new_steps()) or (time.monotonic() > moment and bool(run.workers()))
    )
    return there and not run.new_steps()


def finish(run: Run, undisturbed: dict[str, str], tally: Tally) -> None:
    tally.runs += 1
    if run.saved()[0] == run.steps and run.contents() == undisturbed:
        tally.equal += 1
    else:
        print(f"run {tally.runs} ended at {run.saved()[0]} with other weights", flush=True)


def bench(faults: int, every: int, seed: int, folder: Path) -> Tally:
    dice, tally = random.Random(seed), Tally()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))
    steps = 20 * every
    alone = Run(folder / "alone", folder / "tokens", steps, every)
    alone.start()
    if alone.wait() != 0:
        raise SystemExit(alone.output())
    undisturbed = alone.contents()
    # every kind equally often, in random order
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(faults)]
    dice.shuffle(kinds)
    run = Run(folder / "run-1", folder / "tokens", steps, every)
    expected: Expected | None = None
    while kinds or expected is not None:
        run.start()
        if kinds and kinds[-1] == "a rank killed while starting" and still_starting(run, dice):
            # what the fault before must lead to, this one must lead to as well
            tally.injected[kinds[-1]] += 1
            kill_a_rank(run, dice)
            before, expected = expected, Expected(kinds.pop(), whole(run), run.reached())
            if before is not None and before.step == expected.step:
                tally.survived[before.kind] += 1
            continue
        if resumed(run, tally, expected):
            expected = None
            if kinds and run.reached() < steps - 2 * every:
                expected = disturb(run, kinds.pop(), dice, tally)
                continue
        if run.wait() != 0:
            raise SystemExit(f"a start failed by itself:\n{run.output()[-2000:]}")
        finish(run, undisturbed, tally)
        shutil.rmtree(run.folder)
        expected = None
        run = Run(folder / f"run-{tally.runs + 1}", folder / "tokens", steps, every)
        print(f"{sum(tally.injected.values())} faults", flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tally = bench(arguments.faults, arguments.every, arguments.seed, Path(folder))
    for kind, injected in sorted(tally.injected.items()):
        print(f"{kind:30} {tally.survived[kind]:4} of {injected:4} survived")
    print(f"runs bit-equal to the undisturbed one: {tally.equal} of {tally.runs}")
    for name, values in (
        ("steps trained twice per fault", tally.redone),
        ("seconds from a start to its first step", tally.recovery_s),
        ("seconds from SIGTERM to the end", tally.stopping_s),
    ):
        if values:
            print(f"{name}: median {statistics.median(values):.3g}, most {max(values):.3g}")
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(vars(tally), indent=1) + "\n")
    good = tally.survived == tally.injected and tally.equal == tally.runs > 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
