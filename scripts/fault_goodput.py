"""How much of the time a run trains that is killed again and again: part of bench_faults.py."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from fault_kinds import kill_a_rank_and_look_on
from fault_run import Run, make_tokens

UNDISTURBED_S = 30.0  # for which a run shows its speed before it is disturbed


@dataclass
class Goodput:
    seconds: float
    kills: int
    steps: int  # that lasted
    undisturbed: float  # steps a second, saves included, of a run that nobody kills

    @property
    def share(self) -> float:
        return self.steps / (self.seconds * self.undisturbed)


def endless(folder: Path, tokens: Path, every: int) -> Run:
    """Started, and at its first step."""
    run = Run(folder, tokens, 10**9, every)
    run.start(restarts=10**6)
    if not run.until(run.stepped):
        raise SystemExit(run.output()[-2000:])
    return run


def goodput(mtbf: float, minutes: float, every: int, seed: int, folder: Path) -> Goodput:
    """Kill a random rank at random moments, `mtbf` seconds apart on average, and look on."""
    dice = random.Random(seed)
    make_tokens(folder)
    run = endless(folder / "undisturbed", folder / "tokens", every)
    time.sleep(UNDISTURBED_S)
    first, *_, last = run.rows()
    run.kill_all()
    undisturbed = (last["step"] - first["step"]) / (last["time"] - first["time"])
    run = endless(folder / "run", folder / "tokens", every)
    began, kills = time.monotonic(), 0
    end = began + 60 * minutes
    while True:
        moment = time.monotonic() + dice.expovariate(1 / mtbf)
        time.sleep(max(0.0, min(moment, end) - time.monotonic()))
        if not run.goes_on():
            raise SystemExit(f"the run ended:\n{run.output()[-2000:]}")
        if time.monotonic() >= end:
            break
        kill_a_rank_and_look_on(run, dice)
        kills += 1
    steps, seconds = run.reached(), time.monotonic() - began
    run.kill_all()
    return Goodput(seconds, kills, steps, undisturbed)
