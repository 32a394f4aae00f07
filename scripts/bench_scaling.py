"""Configs in many layouts: tokens/s per GPU, share of one GPU's, memory, the plan's prediction.

    python scripts/bench_scaling.py --gpus 4 --config "experiment=gpt_1.3b data.micro_batch_size=8"
    python scripts/bench_scaling.py --gpus 8 --config "model=llama_8b" --json a.json --plot a.png \
        --layout "1 parallel=data" --layout "8 parallel=fsdp" --layout "8 parallel=tensor8"
    python scripts/bench_scaling.py --gpus 4 --config "experiment=gpt_1.3b" --steps 100 --losses
    python scripts/bench_scaling.py --gpus 2 @scripts/scaling/two_gpus.txt --json a.json

A layout is an optional number of processes on this machine, then Hydra overrides. A config has the
layouts that follow it; without any, the usual ones on --gpus GPUs, one GPU first. A rank that sees
its own samples gets --micro-batches of data.micro_batch_size sequences a step (a pipeline four a
stage), unless a layout names data.batch_size; with --losses all get the same global batch. Random
tokens, unless a config names data. All cases on as many processes are measured by one torchrun,
--together lets several that need fewer GPUs run at the same time. Without a GPU the same over gloo
on the CPU, where speeds mean nothing.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan import complete

from flashtrain.compose import load, read, resolve
from flashtrain.config import Config, ConfigError
from flashtrain.layout import data_ranks, resolve_parallel
from flashtrain.planning.gpus import build_cluster, one_host
from flashtrain.planning.layouts import predict
from scripts.parts.scaling_runs import measured

COLUMNS = {
    "layout": "layout", "gpus": "GPUs", "ms/step": "ms/step", "tokens/s/GPU": "tokens/s/GPU",
    "share": "of one GPU", "predicted tokens/s/GPU": "predicted", "speed error": "error",
    "peak GB": "peak GB", "predicted GB": "predicted", "memory error": "error",
}  # fmt: skip


def usual_layouts(gpus: int) -> list[str]:
    """Every axis alone, and the pairs that are in use."""
    layouts = ["1 parallel=data"]
    tensor = 2
    while tensor <= gpus:
        layouts.append(f"{tensor} parallel=tensor{tensor}")
        tensor *= 2
    if gpus > 1:
        layouts += [
            f"parallel=tensor{gpus} parallel.overlap=off",
            "parallel=data",
            "parallel=fsdp",
            "parallel=zero1",
            f"parallel=fsdp parallel.context={gpus}",
            "parallel=data parallel.pipeline=2",
            "parallel=zero1 engine=deepspeed",
            "parallel=fsdp engine=deepspeed",
        ]
    if gpus > 3:
        layouts += [
            "parallel=fsdp parallel.tensor=2",
            "parallel=data parallel.pipeline=2 parallel.tensor=2",
        ]
    return layouts


def split_layout(text: str, gpus: int) -> tuple[int, list[str]]:
    """(processes, overrides) of "4 parallel=fsdp"; without the number, all GPUs."""
    words = text.split()
    if words and words[0].isdigit():
        return int(words[0]), words[1:]
    return gpus, words


def case_of(
    config: list[str],
    layout: list[str],
    processes: int,
    micro_batches: int,
    same: int | None,
    also: Sequence[str] = (),
) -> list[str]:
    """Overrides of one layout, the global batch among them. ConfigError for what cannot run."""
    words = [*complete(config), *layout, *also]
    plain = read([*words, "trainer.steps=1"])
    data, trainer = plain.data, plain.trainer
    if not any(word.startswith("data.batch_size=") for word in layout):
        if data.micro_batch_size is None:
            raise ConfigError(
                'data.micro_batch_size must be set: --config "... data.micro_batch_size=8"'
            )
        parallel = resolve_parallel(plain.parallel, plain.engine.name, processes)
        several = 4 * parallel.pipeline if parallel.pipeline > 1 else micro_batches
        batch = same or data.micro_batch_size * data_ranks(parallel) * several
        held_out = -(-128 // data_ranks(parallel)) * data_ranks(parallel)
        words += [f"data.batch_size={batch}", f"trainer.evaluate_sequences={held_out}"]
        data = dataclasses.replace(data, batch_size=batch)
        trainer = dataclasses.replace(trainer, evaluate_sequences=held_out)
    resolve(dataclasses.replace(plain, data=data, trainer=trainer), processes)
    return words


def predicted(words: list[str], processes: int, gpu: str) -> dict[str, Any]:
    """What the plan says of a layout; the reason where it says nothing."""
    try:
        config: Config = load([*words, "trainer.steps=1"], processes)
        plan = predict(config, processes, one_host(build_cluster(gpu), processes))
    except ValueError as error:
        return {"not predicted": str(error)}
    return {
        "predicted tokens/s/GPU": round(plan.tokens_per_second / processes),
        "predicted GB": round(plan.memory.allocated / 1e9, 2),
        "predicted bound": plan.step.bound,
    }


def finish(done: list[dict[str, Any]]) -> None:
    """Of measured rows: shares of the rate of a config's first layout on one GPU, and errors of
    predictions."""
    for row in done:
        mates = (one for one in done if one["gpus"] == 1 and one["config"] == row["config"])
        if (one := next(mates, None)) is not None:
            row["share"] = f"{row['tokens/s/GPU'] / one['tokens/s/GPU']:.1%}"
        if "predicted tokens/s/GPU" in row:
            row["speed error"] = f"{row['predicted tokens/s/GPU'] / row['tokens/s/GPU'] - 1:+.1%}"
            if row["peak GB"]:
                row["memory error"] = f"{row['predicted GB'] / row['peak GB'] - 1:+.1%}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown, to be put into a README as it is; one for each config."""
    for config, group in itertools.groupby(rows, lambda row: row["config"]):
        print(f"\n{config}\n")
        _print_rows(list(group))


def _print_rows(rows: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        if "error" in row:
            print(f"| {row['layout']} | {row['gpus']} | {row['error']} |" + " |" * 7)
        else:
            print("| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |")


def compare_losses(rows: list[dict[str, Any]]) -> None:
    """Largest relative difference of each layout's losses from those of its config's first one."""
    found = [row for row in rows if "losses" in row]
    for _, group in itertools.groupby(found, lambda row: row["config"]):
        first, *others = group
        for row in others:
            pairs = list(zip(first["losses"], row["losses"], strict=True))
            worst = max(abs(a - b) / abs(a) for a, b in pairs)
            mean = sum(abs(a - b) / abs(a) for a, b in pairs) / len(pairs)
            last = row["losses"][-1]
            print(
                f"{row['layout']}: losses differ by at most {worst:.1e}, {mean:.1e} on average, "
                f"from {first['layout']}; the last is {last:.4f}, not {first['losses'][-1]:.4f}"
            )


def row_of(text: str, config: str, same: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """A layout before it is measured; with `error` where it is refused, which is here, before
    torchrun."""
    processes, layout = split_layout(text, options.gpus)
    row: dict[str, Any] = {"config": config, "layout": " ".join(layout), "gpus": processes}
    try:
        words = case_of(
            config.split(), layout, processes, options.micro_batches, same, options.also.split()
        )
        row["case"] = " ".join(words)
    except ConfigError as error:
        row["error"] = str(error)
    return row


class Case(argparse.Action):
    """--config begins a list of layouts, --layout adds to it."""

    def __call__(self, parser: Any, options: Any, value: Any, option: str | None = None) -> None:
        if option == "--config":
            options.cases = [*(options.cases or []), (value, [])]
        elif not options.cases:
            parser.error("--layout belongs to the --config before it: name that first")
        else:
            options.cases[-1][1].append(value)


class Parser(argparse.ArgumentParser):
    """@FILE stands for the arguments in a file, written as on a command line."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(fromfile_prefix_chars="@", **keywords)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)


def planned(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that the command line asks for, not measured yet."""
    rows: list[dict[str, Any]] = []
    for config, layouts in options.cases:
        same = read(complete(config.split())).data.batch_size if options.losses else None
        texts = layouts or usual_layouts(options.gpus)
        rows += [row_of(text, config, same, options) for text in texts]
    return rows


def measure(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, str]:
    """Fills the rows; where and when that was."""
    environment: dict[str, str] = {"date": time.strftime("%Y-%m-%d")}
    for row in rows:
        if "error" in row:
            print(f"{row['gpus']} {row['layout']}: {row['error']}", flush=True)
    for row, found in measured([row for row in rows if "error" not in row], options):
        row |= found
        if "gpu" in row:
            environment |= {key: row.pop(key) for key in ("gpu", "torch", "python")}
        said = (
            row.get("error") or f"{row['tokens/s/GPU']} tokens/s/GPU, {row['start s']} s to start"
        )
        print(f"{row['gpus']} {row['layout']}: {said}", flush=True)
        if options.json:  # after each one: what was measured is not lost with what follows
            write(rows, environment, options.json)
    return environment


def write(rows: list[dict[str, Any]], environment: dict[str, str], path: Path) -> None:
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2))


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    case = {"action": Case, "dest": "cases"}
    parser.add_argument("--config", help="Hydra overrides of the layouts after it", **case)
    parser.add_argument("--layout", help="[processes] and overrides of one layout", **case)
    parser.add_argument("--also", default="", help="overrides of all, after those of the layout")
    parser.add_argument("--gpus", type=int, help="processes of a layout without any")
    parser.add_argument("--micro-batches", type=int, default=1, help="a step and rank (default 1)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps first (default 5)")
    parser.add_argument("--limit", type=int, default=600, help="seconds of one layout at most")
    parser.add_argument("--together", action="store_true", help="use GPUs that a layout leaves")
    parser.add_argument("--losses", action="store_true", help="one batch for all, compare losses")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    parser.add_argument("--plot", type=Path, help="draw measured beside predicted here (PNG)")
    parser.add_argument("--again", type=Path, help="JSON of a run: only predict and print anew")
    options = parser.parse_args()
    if not options.again and not (options.cases and options.gpus):
        parser.error("give --config and --gpus, or --again FILE")
    try:
        if options.plot:
            from scripts.parts.scaling_plot import draw_bars, pyplot

            pyplot()  # refused now and not after the runs
        report = json.loads(options.again.read_text()) if options.again else None
        rows = report["rows"] if report else planned(options)
    except (ValueError, OSError) as error:
        print(f"bench_scaling: {error}", file=sys.stderr)
        return 2
    environment = report["environment"] if report else measure(rows, options)
    done = [row for row in rows if "tokens/s/GPU" in row]
    for row in done:
        row |= predicted(row["case"].split(), row["gpus"], environment["gpu"])
    finish(done)
    print(", ".join(environment.values()))
    print_table(rows)
    if options.losses:
        compare_losses(rows)
    if options.json:
        write(rows, environment, options.json)
    if options.plot and done:
        draw_bars(done, f"{environment.get('gpu')}, {environment.get('date')}", options.plot)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
