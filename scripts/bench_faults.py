"""Breaks a small run again and again, starts it with the same command, and counts what was lost.

    python scripts/bench_faults.py                        # 11 faults, a few minutes on two cores
    python scripts/bench_faults.py --faults 200 --seed 1 --json faults.json
    python scripts/bench_faults.py --faults 0 --corruptions 1000
    python scripts/bench_faults.py --faults 0 --mtbf 60 --minutes 10
    python scripts/bench_faults.py --faults 0 --stall 0.4 --write 12 --restart 60 --load 20

Two processes on the CPU. A fault falls at a random moment; the next start must go on, without help,
from the newest checkpoint that is whole. Every run ends undisturbed, and its weights and optimizer
must then be bit for bit those of a run that saw no fault. Exit status 1 if any of this fails.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import effective_time
from fault_fuzz import fuzz
from fault_goodput import goodput
from fault_kinds import (
    FULL,
    KINDS,
    RESTARTED,
    RESUMING,
    SILENT,
    STARTING,
    Run,
    Silence,
    kill_a_rank,
    make_tokens,
)
from fault_node import WAYS, lose_node

from flashtrain.checkpoint.shelf import checkpoints

WAIT_S = 8.0  # after a start, within which a rank is killed `while starting`
DISK_MB = 64


@dataclass
class Tally:
    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    redone: dict[str, list[int]] = field(default_factory=dict)  # steps trained twice, by kind
    recovery_s: list[float] = field(default_factory=list)  # from a start to its first step
    stopping_s: list[float] = field(default_factory=list)  # from SIGTERM to the end
    fault_s: list[float] = field(default_factory=list)  # from one fault to the next
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
    """Break a run that trains; what its next start must do, or None where there is none."""
    target = run.reached() + dice.randrange(run.every)
    run.until(lambda: run.reached() >= target)
    began = time.monotonic()
    tally.injected[kind] += 1
    KINDS[kind](run, dice)
    if kind == "SIGTERM":
        tally.stopping_s.append(time.monotonic() - began)
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


def bench(faults: int, every: int, seed: int, folder: Path, only: list[str]) -> Tally:
    dice, tally, silence = random.Random(seed), Tally(), Silence()
    steps = 20 * every
    undisturbed = undisturbed_run(folder, steps, every).contents()
    # every kind equally often, in random order
    kinds = [only[i % len(only)] for i in range(faults)]
    dice.shuffle(kinds)
    run = Run(folder / "run-1", folder / "tokens", steps, every)
    expected: Expected | None = None
    clock = time.monotonic()
    while kinds or expected is not None:
        kind = kinds[-1] if kinds else ""
        if not run.goes_on():
            silent = silence if expected is not None and expected.kind == SILENT else None
            run.start(restarts=int(kind == RESTARTED), wandb=silent)
        if kind in (STARTING, RESUMING) and not_yet_training(run, kind, dice):
            # what the fault before must lead to, this one must lead to as well
            tally.injected[kind] += 1
            kill_a_rank(run, dice)
            before, expected = expected, Expected(kinds.pop(), whole(run), run.reached())
            if before is not None and before.step == expected.step:
                tally.survived[before.kind] += 1
            continue
        if resumed(run, tally, expected):
            expected = None
            if kinds and run.reached() < steps - 4 * every:
                tally.fault_s.append(time.monotonic() - clock)
                clock = time.monotonic()
                expected = disturb(run, kinds.pop(), dice, tally)
                continue
        if run.wait() != 0:
            raise SystemExit(f"a start failed by itself:\n{run.output()[-2000:]}")
        finish(run, undisturbed, tally)
        shutil.rmtree(run.folder)
        expected = None
        run = Run(folder / f"run-{tally.runs + 1}", folder / "tokens", steps, every)
        print(f"{tally.injected.total()} faults", flush=True)
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


def report(tally: Tally, every: int) -> None:
    print(f"steps trained twice: median and most, with a checkpoint every {every}")
    for kind, injected in sorted(tally.injected.items()):
        redone = tally.redone.get(kind)
        twice = f", {statistics.median(redone):g} and {max(redone)} twice" if redone else ""
        print(f"{kind:34} {tally.survived[kind]:4} of {injected:4} survived{twice}")
    print(f"runs bit-equal to the undisturbed one: {tally.equal} of {tally.runs}")
    for name, values in (
        ("steps trained twice per fault", [n for steps in tally.redone.values() for n in steps]),
        ("seconds from a start to its first step", tally.recovery_s),
        ("seconds from SIGTERM to the end", tally.stopping_s),
        ("seconds per fault", tally.fault_s),
    ):
        if values:
            print(f"{name}: median {statistics.median(values):.3g}, most {max(values):.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faults",
        type=int,
        default=len(KINDS),
        help="one after the other (default: each kind once)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        metavar="KIND",
        help="kinds of faults (default: all)",
    )
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--corruptions", type=int, default=0, help="rounds on copies, no processes")
    parser.add_argument("--node-losses", type=int, default=0, help="rounds, in network namespaces")
    parser.add_argument("--mtbf", type=float, help="seconds between failures, for the goodput")
    parser.add_argument("--minutes", type=float, default=10.0, help="of --mtbf")
    parser.add_argument("--seed", type=int, default=0, help="of what falls when (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    effective_time.add_arguments(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    results: dict[str, object] = {}
    good = True
    if arguments.corruptions:
        began = time.monotonic()
        outcome = fuzz(arguments.corruptions, arguments.seed)
        for kind in outcome.detected | outcome.harmless:
            print(
                f"{kind:34} {outcome.detected[kind]:4} detected, {outcome.harmless[kind]} harmless"
            )
        for line in outcome.missed:
            print(f"missed: {line}")
        print(
            f"{outcome.rounds} damaged copies in {time.monotonic() - began:.0f} s: "
            f"{len(outcome.missed)} missed"
        )
        results["corruptions"], good = vars(outcome), good and not outcome.missed
    if arguments.faults:
        with small_disk(FULL in arguments.only) as folder:
            tally = bench(arguments.faults, arguments.every, arguments.seed, folder, arguments.only)
        report(tally, arguments.every)
        results["faults"] = vars(tally)  # asdict does not copy a Counter
        good = good and tally.survived == tally.injected and tally.equal == tally.runs > 0
    if arguments.node_losses:
        with small_disk(False) as folder:
            undisturbed_run(folder, 20, 20)
            lost = [
                lose_node(folder / f"{way}-{number}", folder / "tokens", way)
                for number in range(arguments.node_losses)
                for way in WAYS
            ]
        for one in lost:
            print(
                f"node {one.way}: {one.skipped}, so not tried"
                if one.skipped
                else f"node {one.way}: the spare was started {one.started_s:.3g} s later, "
                f"and a step done after {one.trained_s:.3g} s"
                if one.started_s and one.trained_s
                else f"node {one.way}: never trained again"
            )
        results["node_losses"] = [asdict(one) for one in lost]
        good = good and all(one.skipped or one.trained_s for one in lost)
    if arguments.mtbf:
        with small_disk(False) as folder:
            kept = goodput(
                arguments.mtbf, arguments.minutes, arguments.every, arguments.seed, folder
            )
        print(
            f"goodput {kept.share:.1%}: {kept.steps} steps lasted in {kept.seconds:.0f} s with "
            f"{kept.kills} kills; undisturbed {kept.undisturbed:.1f} a second"
        )
        results["goodput"] = {**asdict(kept), "share": kept.share}
    if arguments.stall:
        print(effective_time.from_arguments(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
