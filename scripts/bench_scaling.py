"""One config in many layouts: tokens/s per GPU, share of one GPU's, memory, the plan's prediction.

    python scripts/bench_scaling.py --gpus 4 --config "experiment=gpt_1.3b data.micro_batch_size=8"
    python scripts/bench_scaling.py --gpus 8 --config "model=llama_8b" --json a.json --plot a.png \
        --layout "1 parallel=data" --layout "8 parallel=fsdp" --layout "8 parallel=tensor8"
    python scripts/bench_scaling.py --gpus 4 --config "experiment=gpt_1.3b" --steps 100 --losses

A layout is an optional number of processes on this machine, then Hydra overrides; neighbours on as
many processes are measured by one torchrun. Without --layout: the usual ones on --gpus GPUs, one
GPU first. A rank that sees its own samples gets --micro-batches of data.micro_batch_size sequences
a step (a pipeline four a stage), unless a layout names data.batch_size; with --losses all get the
same global batch. Random tokens. Without a GPU the same over gloo on the CPU, where speeds mean
nothing.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan import complete

from flashtrain.compose import load, read
from flashtrain.config import Config, ConfigError
from flashtrain.layout import data_ranks, resolve_parallel
from flashtrain.planning.gpus import build_cluster, one_host
from flashtrain.planning.layouts import predict

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
    config: list[str], layout: list[str], processes: int, micro_batches: int, same: int | None
) -> list[str]:
    """Overrides of one layout, the global batch among them. ConfigError for what cannot run."""
    words = [*complete(config), *layout]
    if any(word.startswith("data.batch_size=") for word in layout):
        return words
    plain = read(words)
    parallel = resolve_parallel(plain.parallel, plain.engine.name, processes)
    size = plain.data.micro_batch_size
    if size is None:
        raise ConfigError(
            'data.micro_batch_size must be set: --config "... data.micro_batch_size=8"'
        )
    several = 4 * parallel.pipeline if parallel.pipeline > 1 else micro_batches
    batch = same or size * data_ranks(parallel) * several
    held_out = -(-128 // data_ranks(parallel)) * data_ranks(parallel)
    return [*words, f"data.batch_size={batch}", f"trainer.evaluate_sequences={held_out}"]


def run_cases(
    cases: list[list[str]], processes: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What scaling_worker.py measured of each case, as soon as it has; `error` where it failed.

    One torchrun does them all, since it takes longer to start than to time; the case after one
    that failed starts another.
    """
    done = 0
    while done < len(cases):
        for row in run_until_failure(cases[done:], processes, options):
            yield row
            done += 1


def run_until_failure(
    cases: list[list[str]], processes: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name, Path(name, "stderr").open("w+") as errors:
        given, rows = Path(name, "cases.json"), Path(name, "rows.jsonl")
        given.write_text(json.dumps(cases))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(ROOT / "scripts" / "scaling_worker.py")),
            *("--cases", str(given), "--rows", str(rows)),
            *("--steps", str(options.steps), "--warmup", str(options.warmup)),
        ]
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for at in range(len(cases)):
                line = next_line(rows, at, run, time.monotonic() + options.limit)
                if line is not None:
                    yield json.loads(line)
                    continue
                if run.poll() is None:
                    yield {"error": f"took longer than {options.limit} s"}
                else:
                    yield {"error": reason(Path(errors.name).read_text())}
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(60)
        finally:
            run.terminate()  # torchrun ends its ranks, and kills them after 30 s
            run.wait()


def next_line(rows: Path, at: int, run: subprocess.Popen[bytes], deadline: float) -> str | None:
    """Line `at` of a file, once it is there; None when its writer ended without or the time is
    over."""
    while True:
        ended = run.poll() is not None  # before the look: what it wrote last counts
        lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
        if len(lines) > at and lines[at].endswith("\n"):
            return lines[at]
        if ended or time.monotonic() > deadline:
            return None
        time.sleep(0.1)


def reason(said: str) -> str:
    """The line of the first traceback that says why."""
    found = re.search(r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception): .*)", said, re.MULTILINE)
    return found[1] if found else said[-200:].strip()


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


def finish(rows: list[dict[str, Any]]) -> None:
    """Shares of the one-GPU rate, and errors of predictions."""
    one = next((row for row in rows if row["gpus"] == 1 and "tokens/s/GPU" in row), None)
    for row in rows:
        if "tokens/s/GPU" not in row:
            continue
        if one is not None:
            row["share"] = f"{row['tokens/s/GPU'] / one['tokens/s/GPU']:.1%}"
        if "predicted tokens/s/GPU" in row:
            row["speed error"] = f"{row['predicted tokens/s/GPU'] / row['tokens/s/GPU'] - 1:+.1%}"
            if row["peak GB"]:
                row["memory error"] = f"{row['predicted GB'] / row['peak GB'] - 1:+.1%}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown, to be put into a README as it is."""
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        if "error" in row:
            print(f"| {row['layout']} | {row['gpus']} | {row['error']} |" + " |" * 7)
        else:
            print("| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |")


def compare_losses(rows: list[dict[str, Any]]) -> None:
    """Largest relative difference of each layout's losses from the first one's."""
    found = [row for row in rows if "losses" in row]
    for row in found[1:]:
        pairs = zip(found[0]["losses"], row["losses"], strict=True)
        worst = max(abs(a - b) / abs(a) for a, b in pairs)
        print(f"{row['layout']}: losses differ by at most {worst:.1e} from {found[0]['layout']}")


def row_of(
    text: str, config: list[str], same: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """A layout before it is measured; with `error` where it is refused, which is here, before
    torchrun."""
    processes, layout = split_layout(text, options.gpus)
    row: dict[str, Any] = {"layout": " ".join(layout), "gpus": processes}
    try:
        words = case_of(config, layout, processes, options.micro_batches, same)
        load([*words, "trainer.steps=1"], processes)
        row["case"] = " ".join(words)
    except ConfigError as error:
        row["error"] = str(error)
    return row


def measured(
    rows: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row with what was found of it. Neighbours on as many processes share a torchrun;
    DeepSpeed, which keeps things for as long as its process lives, has one for each case."""

    def shared(row: dict[str, Any]) -> object:
        alone = "engine=deepspeed" in row.get("case", "") or "error" in row
        return id(row) if alone else row["gpus"]

    for _, group in itertools.groupby(rows, shared):
        own = list(group)
        if "error" in own[0]:
            yield own[0], {}
            continue
        cases = [row["case"].split() for row in own]
        yield from zip(own, run_cases(cases, own[0]["gpus"], options), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="Hydra overrides of all layouts")
    parser.add_argument("--layout", action="append", help="[processes] and overrides of one layout")
    parser.add_argument("--gpus", type=int, required=True, help="processes of a layout without any")
    parser.add_argument("--micro-batches", type=int, default=1, help="a step and rank (default 1)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps first (default 5)")
    parser.add_argument("--limit", type=int, default=600, help="seconds of one layout at most")
    parser.add_argument("--losses", action="store_true", help="one batch for all, compare losses")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    parser.add_argument("--plot", type=Path, help="draw measured beside predicted here (PNG)")
    options = parser.parse_args()
    config = options.config.split()
    environment: dict[str, str] = {"date": time.strftime("%Y-%m-%d")}
    try:
        if options.plot:
            from scaling_plot import draw_bars, pyplot

            pyplot()  # refused now and not after the runs
        same = read(complete(config)).data.batch_size if options.losses else None
    except ValueError as error:
        print(f"bench_scaling: {error}", file=sys.stderr)
        return 2
    layouts = options.layout or usual_layouts(options.gpus)
    rows = [row_of(text, config, same, options) for text in layouts]
    for row, found in measured(rows, options):
        row |= found
        if "gpu" in row:
            environment |= {key: row.pop(key) for key in ("gpu", "torch", "python")}
            row |= predicted(row["case"].split(), row["gpus"], environment["gpu"])
        said = (
            row.get("error") or f"{row['tokens/s/GPU']} tokens/s/GPU, {row['start s']} s to start"
        )
        print(f"{row['gpus']} {row['layout']}: {said}", flush=True)
        if options.json:  # after each one: what was measured is not lost with what follows
            finish(rows)
            report = {"environment": environment, "rows": rows}
            options.json.write_text(json.dumps(report, indent=2))
    finish(rows)
    print_table(rows)
    if options.losses:
        compare_losses(rows)
    done = [row for row in rows if "tokens/s/GPU" in row]
    if options.plot and done:
        draw_bars(done, f"{options.config}, {environment.get('gpu')}", options.plot)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
