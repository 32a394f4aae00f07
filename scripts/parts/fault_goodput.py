"""How much of the time a run trains that is killed again and again: part of bench_faults.py.

Training time is that of steps that lasted: from the end of one to the end of the next, where no
kill fell between. Steps and restarts are so measured side by side, on a machine that may have other
work too.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from scripts.parts.fault_kinds import kill_a_rank_and_look_on
from scripts.parts.fault_run import Run, make_tokens


@dataclass
class Goodput:
    seconds: float
    kills: int
    steps: int  # that lasted
    training_s: float  # of these

    @property
    def share(self) -> float:
        return self.training_s / self.seconds


def training_time(ends: Sequence[float], kills: Sequence[float]) -> float:
    """Of the steps that ended then; the first one after a start takes what the median one does."""
    taken = [
        later - sooner
        for sooner, later in pairwise(ends)
        if not any(sooner < kill < later for kill in kills)
    ]
    return sum(taken) + (len(ends) - len(taken)) * statistics.median(taken)


def goodput(mtbf: float, minutes: float, every: int, seed: int, folder: Path) -> Goodput:
    """Kill a random rank at random moments, `mtbf` seconds apart on average, and look on."""
    dice = random.Random(seed)
    make_tokens(folder)
    run = Run(folder / "run", folder / "tokens", 10**9, every)
    run.start(restarts=10**6)
    if not run.until(run.stepped):
        raise SystemExit(run.output()[-2000:])
    began = time.time()
    end, kills = began + 60 * minutes, []
    while True:
        moment = time.time() + dice.expovariate(1 / mtbf)
        time.sleep(max(0.0, min(moment, end) - time.time()))
        if not run.goes_on():
            raise SystemExit(f"the run ended:\n{run.output()[-2000:]}")
        if time.time() >= end:
            break
        kills.append(time.time())
        kill_a_rank_and_look_on(run, dice)
    ends = [row["time"] for row in run.rows() if row["time"] > began]
    seconds = time.time() - began
    run.kill_all()
    return Goodput(seconds, len(kills), len(ends), training_time(ends, kills))
