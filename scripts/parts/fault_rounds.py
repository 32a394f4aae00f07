"""Fault after fault in one run after the other, and what was lost by each: for bench_faults.py."""

import contextlib
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flashtrain.checkpoint.integrity import MANIFEST
from flashtrain.checkpoint.shelf import checkpoints
from scripts.parts.fault_kinds import (
    FULL,
    KINDS,
    RESTARTED,
    RESUMING,
    SILENT,
    STARTING,
    kill_a_rank,
)
from scripts.parts.fault_run import Run, Silence, make_tokens

WAIT_S = 8.0  # after a start, within which a rank is killed `while starting`
DISK_MB = 64


@dataclass
class Tally:
    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    redone: dict[str, list[int]] = field(default_factory=dict)  # steps trained twice, by kind
    recovery_s: list[float] = field(default_factory=list)  # from a start to its first step
    saved_s: list[float] = field(default_factory=list)  # from SIGTERM to a complete checkpoint
    stopping_s: list[float] = field(default_factory=list)  # from SIGTERM to the end
    fault_s: list[float] = field(default_factory=list)  # from one fault to the next
    runs: int = 0
    equal: int = 0  # runs whose end is bit for bit that of the undisturbed one

    def add(self, other: "Tally") -> None:
        self.injected += other.injected
        self.survived += other.survived
        for kind, steps in other.redone.items():
            self.redone.setdefault(kind, []).extend(steps)
        self.recovery_s += other.recovery_s
        self.saved_s += other.saved_s
        self.stopping_s += other.stopping_s
        self.fault_s += other.fault_s
        self.runs += other.runs
        self.equal += other.equal


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
    if not run.until(run.stepped):
        return False
    tally.recovery_s.append(time.monotonic() - began)
    if expected is not None:
        came_back = run.new_steps()[0] - 1
        if came_back == expected.step:
            tally.survived[expected.kind] += 1
        else:
            print(f"lost: {expected}, and the run went on from step {came_back}", flush=True)
        tally.redone.setdefault(expected.kind, []).append(expected.reached - came_back)
    return True


def disturb(run: Run, kind: str, dice: random.Random, tally: Tally) -> Expected | None:
    """Break a run that trains; what its next start must do; None where there is none, or where
    the run ended before the fault came."""
    target = run.reached() + dice.randrange(run.every)
    run.until(lambda: run.reached() >= target)
    began = time.time()
    KINDS[kind](run, dice)
    if kind not in ("SIGTERM", FULL) and not run.goes_on() and run.wait() == 0:
        return None  # it came too late: the run is at its end
    tally.injected[kind] += 1
    if kind == "SIGTERM":
        tally.stopping_s.append(time.time() - began)
        newest = checkpoints(run.folder / "checkpoints")[0]
        tally.saved_s.append((newest / MANIFEST).stat().st_mtime - began)
    if kind == FULL:  # no start at all: it trains on, and the next save succeeds
        saved = run.saved()[0]
        if run.until(lambda: run.saved()[0] > saved):
            tally.survived[kind] += 1
        return None
    reached, step = run.reached(), whole(run)
    return Expected(kind, reached if kind == "SIGTERM" else step, reached)


def not_yet_training(run: Run, kind: str, dice: random.Random) -> bool:
    """Wait until a start is as far as `kind` asks for; False where it made a step by then.

    While starting: a random while, until there are ranks. While resuming: rank 0 has taken the
    run's lock, and reads the checkpoint.
    """
    moment = time.monotonic() + dice.uniform(0, WAIT_S)
    lock = run.folder / "lock"

    def there() -> bool:
        if kind == RESUMING:
            with contextlib.suppress(OSError):
                return lock.stat().st_mtime > run.began
            return False
        return time.monotonic() > moment and bool(run.workers())

    run.until(lambda: run.stepped() or there())
    if kind == RESUMING:
        time.sleep(dice.uniform(0, 0.5))
    return run.goes_on() and not run.stepped()


def finish(run: Run, undisturbed: dict[str, str], tally: Tally) -> None:
    tally.runs += 1
    if run.saved()[0] == run.steps and run.contents() == undisturbed:
        tally.equal += 1
    else:
        print(f"run {tally.runs} ended at {run.saved()[0]} with other weights", flush=True)


def undisturbed_run(folder: Path, steps: int, every: int) -> Run:
    """Makes the tokens too."""
    make_tokens(folder)
    alone = Run(folder / "alone", folder / "tokens", steps, every)
    alone.start()
    if alone.wait() != 0:
        raise SystemExit(alone.output())
    return alone


def bench(faults: int, every: int, seed: int, only: list[str], jobs: int) -> Tally:
    """`faults` of the kinds `only`, each equally often and in random order, on `jobs` runs side by
    side."""
    kinds = [only[i % len(only)] for i in range(faults)]
    random.Random(seed).shuffle(kinds)
    steps, total = 20 * every, Tally()
    with small_disk(False) as common:
        undisturbed = undisturbed_run(common, steps, every).contents()

        def one(job: int) -> Tally:
            with small_disk(FULL in only) as folder:
                first = Run(folder / "run-1", common / "tokens", steps, every)
                dice = random.Random(f"{seed} {job}")
                return _bench(first, kinds[job::jobs], dice, undisturbed)

        pool = ThreadPoolExecutor(jobs)
        try:
            for tally in pool.map(one, range(jobs)):
                total.add(tally)
        except BaseException:  # the others would go on to their ends
            Run.end_all()
            raise
        finally:
            pool.shutdown()
    return total


def _bench(run: Run, kinds: list[str], dice: random.Random, undisturbed: dict[str, str]) -> Tally:
    tally, silence = Tally(), Silence()
    expected: Expected | None = None
    clock = time.monotonic()
    while kinds or expected is not None:
        kind = kinds[-1] if kinds else ""
        if not run.goes_on():
            silent = silence if expected is not None and expected.kind == SILENT else None
            run.start(restarts=int(kind == RESTARTED), wandb=silent)
        early = kind in (STARTING, RESUMING) and run.reached() < run.steps
        if early and not_yet_training(run, kind, dice):
            # what the fault before must lead to, this one must lead to as well
            tally.injected[kind] += 1
            kill_a_rank(run, dice)
            before, expected = expected, Expected(kinds.pop(), whole(run), run.reached())
            if before is not None and before.step == expected.step:
                tally.survived[before.kind] += 1
            elif before is not None:
                print(f"lost: {before}, and then there was {expected.step}", flush=True)
            continue
        if resumed(run, tally, expected):
            expected = None
            if kinds and run.reached() < run.steps - 4 * run.every:
                tally.fault_s.append(time.monotonic() - clock)
                clock = time.monotonic()
                kind = kinds.pop()
                expected = disturb(run, kind, dice, tally)
                if expected is None and kind != FULL:
                    kinds.insert(0, kind)
                continue
        if run.wait() != 0:
            raise SystemExit(f"a start failed by itself:\n{run.output()[-2000:]}")
        finish(run, undisturbed, tally)
        shutil.rmtree(run.folder)
        expected = None
        run = run.anew(f"run-{tally.runs + 1}")
        print(f"{run.folder.parent.name}: {tally.injected.total()} faults", flush=True)
    if run.goes_on():  # the last fault needed no start
        run.wait()
        finish(run, undisturbed, tally)
    return tally


@contextlib.contextmanager
def small_disk(wanted: bool) -> Iterator[Path]:
    """A folder on a disk of DISK_MB of its own, where this process may mount one."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "faults", name]
        mounted = wanted and subprocess.run(mount, capture_output=True).returncode == 0
        if wanted and not mounted:
            print("no right to mount a small disk: files are limited in size instead", flush=True)
        try:
            yield Path(name)
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", name], check=True)
