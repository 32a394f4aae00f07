"""Breaks a small run again and again, starts it with the same command, and counts what was lost.

    python scripts/bench_faults.py                        # 11 faults, a few minutes on two cores
    python scripts/bench_faults.py --faults 200 --jobs 5 --json faults.json      # on 16 cores
    python scripts/bench_faults.py --faults 0 --corruptions 1000
    python scripts/bench_faults.py --faults 0 --mtbf 60 --minutes 10
    python scripts/bench_faults.py --faults 0 --stall 0.4 --write 12 --restart 60 --load 20

Two processes on the CPU. A fault falls at a random moment; the next start must go on, without help,
from the newest checkpoint that is whole. Every run ends undisturbed, and its weights and optimizer
must then be bit for bit those of a run that saw no fault. Exit status 1 if any of this fails.
"""

import argparse
import json
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import effective_time

from scripts.parts.fault_fuzz import fuzz
from scripts.parts.fault_goodput import goodput
from scripts.parts.fault_kinds import KINDS
from scripts.parts.fault_node import WAYS, lose_node
from scripts.parts.fault_rounds import Tally, bench, small_disk, undisturbed_run


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
        ("seconds from SIGTERM to a complete checkpoint", tally.saved_s),
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
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, two processes each (default 1)"
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
        tally = bench(
            arguments.faults, arguments.every, arguments.seed, arguments.only, arguments.jobs
        )
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
            f"goodput {kept.share:.1%}: {kept.steps} steps, which lasted, took "
            f"{kept.training_s:.0f} of {kept.seconds:.0f} s with {kept.kills} kills"
        )
        results["goodput"] = {**asdict(kept), "share": kept.share}
    if arguments.stall:
        print(effective_time.from_arguments(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
