"""How much of the time a long run trains, given how often it fails: a table of expected values.

    python scripts/effective_time.py --stall 0.4 --write 12 --restart 60 --load 20

Failures come at random with a mean time between them. A run saves every tau seconds of training,
which stalls it; a failure costs the training since the last checkpoint that was complete, the
restart and the load. tau is the best one: Young's sqrt(2 stall MTBF) to first order (1974), found
here on Daly's exact expectation (2006, equation 20). Beside the expectation stands one run of 54
days with failures drawn at random, as long as that of Llama 3 405B (466 interruptions, above 90 %).
"""

import argparse
import math
import random
from collections.abc import Sequence

HOUR = 3600.0
DAYS = 54


def effective_share(tau: float, mtbf: float, stall: float, write: float, again: float) -> float:
    """Share of the wall clock that becomes training that lasts. All in seconds.

    tau: training between saves. stall: that a save stops training. write: from there until the
    checkpoint is complete, beside training. again: from a failure to training, load included.
    """
    # to get tau done takes on average M e^(R/M) (e^((tau + stall) / M) - 1); what is trained while
    # a checkpoint is written is lost with it, as the restart's time is
    wall = mtbf * math.exp((again + write) / mtbf) * math.expm1((tau + stall) / mtbf)
    return tau / wall


def best_interval(mtbf: float, stall: float, write: float, again: float) -> float:
    """The tau of the largest share, within a thousandth; not below `write`, one save at a time."""
    low, high = max(write, 1e-3), max(10 * mtbf, 2 * write)
    while high / low > 1.001:  # the share has one maximum: golden-section search on a log scale
        a = low ** (2 / 3) * high ** (1 / 3)
        b = low ** (1 / 3) * high ** (2 / 3)
        if effective_share(a, mtbf, stall, write, again) < effective_share(
            b, mtbf, stall, write, again
        ):
            low = a
        else:
            high = b
    return math.sqrt(low * high)


def simulate(
    tau: float, mtbf: float, stall: float, write: float, again: float, seconds: float, seed: int = 0
) -> tuple[float, int]:
    """Share of `seconds` that became training that lasted, and failures. The rest as above."""
    dice = random.Random(seed)
    clock = done = saved = 0.0  # done: trained since the start; saved: in a complete checkpoint
    failures, failure = 0, dice.expovariate(1 / mtbf)
    pending = (math.inf, 0.0)  # when the checkpoint being written is complete, what it holds
    while clock < seconds:
        end = clock + tau + stall
        if pending[0] <= min(end, failure):
            saved, pending = pending[1], (math.inf, 0.0)
        if end <= failure:
            clock, done = end, done + tau
            pending = (clock + write, done)
            continue
        failures += 1
        clock, done, pending = failure + again, saved, (math.inf, 0.0)
        failure += dice.expovariate(1 / mtbf)
        while failure < clock:  # it failed while it started again
            failures += 1
            clock = failure + again
            failure += dice.expovariate(1 / mtbf)
    return done / clock, failures


def table(
    mtbfs: Sequence[float], gpus: Sequence[int], stall: float, write: float, again: float
) -> str:
    """mtbfs: hours, of the whole run. One line for each, and GPU-hours lost in a day for `gpus`."""
    head = ["MTBF", "save every", "(Young)", "effective", f"simulated, {DAYS} days"]
    head += [f"lost a day, {n:,} GPUs" for n in gpus]
    lines = [" | ".join(head)]
    for hours in mtbfs:
        mtbf = hours * HOUR
        tau = best_interval(mtbf, stall, write, again)
        share = effective_share(tau, mtbf, stall, write, again)
        cells = [f"{hours:g} h", f"{tau:.0f} s", f"{math.sqrt(2 * stall * mtbf):.0f} s"]
        simulated, failures = simulate(tau, mtbf, stall, write, again, DAYS * 24 * HOUR)
        cells += [f"{share:.2%}", f"{simulated:.2%} ({failures} failures)"]
        cells += [f"{(1 - share) * 24 * n:,.0f} GPU-h" for n in gpus]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("effective training time, from measured seconds")
    group.add_argument("--stall", type=float, help="training stops for a save")
    group.add_argument("--write", type=float, default=0.0, help="then until it is on disk")
    group.add_argument("--restart", type=float, default=0.0, help="failure to processes")
    group.add_argument("--load", type=float, default=0.0, help="a checkpoint")
    group.add_argument("--hours", type=float, nargs="+", default=[1.0, 3.0], help="MTBF")
    group.add_argument(
        "--gpus", type=int, nargs="+", default=[1024, 16384], help="of the job (default 1024 16384)"
    )


def from_arguments(arguments: argparse.Namespace) -> str:
    again = arguments.restart + arguments.load
    return table(arguments.hours, arguments.gpus, arguments.stall, arguments.write, again)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.stall is None or min(arguments.stall, *arguments.hours) <= 0:
        parser.error("--stall and --hours must be above 0")
    print(from_arguments(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
