"""Loss curves of several configurations over several seeds: trained, then drawn.

    python scripts/loss_curves.py --common "experiment=null model=gpt2_124m trainer.steps=2000" \\
        --run bf16 precision=bf16 --run fp8 precision=fp8_tensorwise --run muon optimizer=muon \\
        --seeds 1 2 3 --minutes 60 --folder runs/curves --json curves.json --plot curves.png
    python scripts/loss_curves.py --from curves.json --plot curves.png   # draws, without training

Every run is a process of its own on one GPU (or the CPU), its folder FOLDER/NAME-SEED. The same
command goes on where the time budget ended the last one: finished runs are read, others resumed; a
folder that was trained with other overrides is refused.
All configurations train a seed before the next seed begins. A seed sets weights and data order.
--jobs N trains N at once, in turn on the GPUs there are; on one GPU that pays for models too small
to fill it, and then no speed counts.

The table: mean and spread (half of highest minus lowest) over the seeds of the training loss, meant
over the last tenth of the steps, and of the last validation loss; against the first configuration.
The picture needs matplotlib; lines are means over seeds, bands reach from lowest to highest.
"""

import argparse
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashtrain.launch import ENDED
from flashtrain.tracking.compare import read_rows
from scripts.parts.scaling_plot import pyplot
from scripts.parts.where import where

LAST_SHARE = 0.1  # of the steps, over which the final training loss is meant


def is_finished(folder: Path) -> bool:
    ended = folder / ENDED
    return ended.is_file() and json.loads(ended.read_text())["why"] == "finished"


def train(overrides: list[str], folder: Path, deadline: float, gpu: str | None = None) -> str:
    """Train until the end or the deadline, when the run is asked to save; what happened.

    gpu: the one to take, as CUDA_VISIBLE_DEVICES names it.
    """
    log = named(folder, ".log")
    command = [sys.executable, "-m", "flashtrain.train", *overrides]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            code = process.wait(max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            process.terminate()  # which saves
            process.wait()
            return "out of time"
        except BaseException:
            process.kill()
            raise
    return "finished" if code == 0 and is_finished(folder) else f"failed ({code}), see {log}"


def read(folder: Path) -> dict[str, Any]:
    """Curves of one run; a step that was trained twice counts as it was the second time."""
    loss: dict[int, float] = {}
    validation: dict[int, float] = {}
    speeds = []
    for row in read_rows(folder):
        if row.get("train/loss") is not None:
            loss[row["step"]] = row["train/loss"]
        if row.get("validation/loss") is not None:
            validation[row["step"]] = row["validation/loss"]
        if "perf/tokens_per_s" in row:
            speeds.append(row["perf/tokens_per_s"])
    return {
        "loss": sorted(loss.items()),
        "validation": sorted(validation.items()),
        "tokens_per_s": round(statistics.median(speeds)) if speeds else None,
    }


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, within the budget; all curves there are."""
    deadline = time.monotonic() + 60 * args.minutes
    args.folder.mkdir(parents=True, exist_ok=True)
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in itertools.islice(itertools.cycle(gpus()), args.jobs):
        free.put(gpu)

    def one(seed: int, name: str, text: str) -> dict[str, Any] | None:
        folder = args.folder.resolve() / f"{name}-{seed}"
        overrides = [
            *args.common.split(), *text.split(), f"seed={seed}", f"name={name}-{seed}",
            f"run_dir={folder}", "tracking=quiet",
        ]  # fmt: skip
        gpu = free.get()
        began, what = time.monotonic(), "read"
        try:
            if not is_finished(folder):
                what = "no time left"
                if began < deadline:
                    what = train(overrides, folder, deadline, gpu)
        finally:
            free.put(gpu)
        print(f"{name} seed {seed}: {what}, {time.monotonic() - began:.0f} s", flush=True)
        if not (folder / "metrics.jsonl").is_file():
            return None
        return {"name": name, "seed": seed, "overrides": text, **read(folder)}

    planned = [(seed, *run) for seed in args.seeds for run in args.run]
    for seed, name, text in planned:
        refuse_other(args.folder / f"{name}-{seed}", f"{args.common} {text}")
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(filter(None, pool.map(lambda plan: one(*plan), planned)))
    return {
        "environment": where(),
        "common": args.common,
        "runs": runs,
    }


def refuse_other(folder: Path, overrides: str) -> None:
    """End here where `folder` is of other overrides: their curves would pass for these."""
    record, words = named(folder, ".overrides"), " ".join(overrides.split())
    if record.is_file() and record.read_text() != words:
        raise SystemExit(
            f"loss_curves: {folder} is of `{record.read_text()}` and not of `{words}`: take "
            f"another --folder or NAME, or remove {record} to go on with it all the same"
        )
    record.write_text(words)


def named(folder: Path, suffix: str) -> Path:
    """Beside the folder of a run; names may hold dots."""
    return folder.with_name(folder.name + suffix)


def gpus() -> list[str | None]:
    """Those there are, as CUDA_VISIBLE_DEVICES names them; [None]: let a run take what it finds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [*named.split(",")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] or [None]


def by_name(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs with a curve by configuration."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["loss"]:
            found.setdefault(run["name"], []).append(run)
    return found


def final(run: dict[str, Any]) -> float:
    """Mean training loss over the last tenth of the steps."""
    last = run["loss"][-1][0]
    return statistics.fmean(v for step, v in run["loss"] if step > last * (1 - LAST_SHARE))


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':16} {'seeds':>5} {'steps':>6} {'train loss':>17} {'to first':>9} "
        f"{'validation loss':>17} {'tokens/s':>10}"
    ]
    first: float | None = None
    for name, own in by_name(runs).items():
        losses = [final(run) for run in own]
        first = statistics.fmean(losses) if first is None else first
        change = f"{statistics.fmean(losses) / first - 1:+.2%}"
        held = [run["validation"][-1][1] for run in own if run["validation"]]
        speeds = [run["tokens_per_s"] for run in own if run["tokens_per_s"]]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else ""
        steps = sorted({run["loss"][-1][0] for run in own})
        spoken = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
        lines.append(
            f"{name:16} {len(own):5} {spoken:>6} {spread(losses):>17} {change:>9} "
            f"{spread(held):>17} {speed:>10}"
        )
    return lines


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def smoothed(values: list[float], window: int) -> list[float]:
    """Means over the last `window` values, fewer at the start."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def plot(result: dict[str, Any], path: Path, window: int) -> None:
    """Training loss, mean of `window` logged ones, left; validation loss right."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, key, width in zip(axes, ("loss", "validation"), (window, 1), strict=True):
        ends = []
        for name, own in by_name(result["runs"]).items():
            curves = [dict(run[key]) for run in own if run[key]]
            if not curves:
                continue
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            rows = [smoothed([curve[s] for s in steps], width) for curve in curves]
            columns = list(zip(*rows, strict=True))
            (line,) = axis.plot(steps, [statistics.fmean(c) for c in columns], label=name, lw=1.2)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
            ends += [high[len(high) // 10], min(low)]
        if ends:  # the first tenth, which falls from the logarithm of the vocabulary, may leave
            axis.set_ylim(min(ends) - 0.03 * (max(ends) - min(ends)), max(ends))
        axis.set_xlabel("step")
        axis.set_ylabel("validation loss" if key == "validation" else "training loss")
        axis.grid(alpha=0.3)
        axis.legend()
    where = result["environment"]
    title = textwrap.fill(result["common"], 160)
    figure.suptitle(f"{title}\n{where['gpu']}, torch {where['torch']}, {where['date']}", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--common", default="", help="Hydra overrides of all runs")
    add("--run", nargs=2, action="append", metavar=("NAME", "OVERRIDES"), help="a configuration")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    add("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    add("--minutes", type=float, default=60.0, help="time budget of all runs together")
    add("--folder", type=Path, default=Path("runs/curves"), help="where the runs lie")
    add("--from", type=Path, dest="source", help="a JSON file of earlier curves: no training")
    add("--json", type=Path, help="write the curves there")
    add("--plot", type=Path, help="draw them there, .png or .svg")
    add("--smooth", type=int, default=10, help="logged losses that a point of the plot is meant of")
    args = parser.parse_args()
    if (args.source is None) == (not args.run):
        parser.error("name configurations with --run NAME OVERRIDES, or a file with --from")
    if args.plot:
        try:
            pyplot()  # refused now and not after the runs
        except ValueError as error:
            parser.error(str(error))
    result = run_all(args) if args.source is None else json.loads(args.source.read_text())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result["runs"])))
    if args.plot:
        plot(result, args.plot, args.smooth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
