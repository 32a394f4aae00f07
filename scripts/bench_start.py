"""Seconds from the command to the end of the first step: with nothing compiled before, and again.

    python scripts/bench_start.py                                   # gpt2_124m, 32 x 1024
    python scripts/bench_start.py --case "experiment=gpt_1.3b data.batch_size=8 ..."

Each start is a process of its own: imports, CUDA, weights, compilation, and whole steps on made-up
tokens. `cold` begins with empty caches of torch.compile and Triton, in a temporary folder; `warm`
is the same command once more.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEFAULT = (
    "experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 data.micro_batch_size=32"
)
ENDED = "step ended:"  # what a process says of each of its steps
KINDS = ("cold", "warm")


def run_steps(case: str, steps: int, cpu: bool) -> None:
    """What the timed processes do. Imports here: they are a part of a start."""
    import torch

    from flashtrain.build import build_engine
    from flashtrain.compose import load
    from flashtrain.data.source import open_loader, prepare_source
    from flashtrain.parallel.mesh import mesh_of

    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    overrides = case.split() if "data=" in case else [*case.split(), "data=random"]
    config = prepare_source(load([*overrides, f"trainer.steps={steps}"]), 1)
    engine = build_engine(config, mesh_of(config.parallel), device)
    with open_loader(config, 0, 1, device) as loader:
        for number in range(steps):
            loss = engine.forward_backward(loader.step(number))
            engine.step(config.optimizer.lr * 0.1)
            print(ENDED, float(loss), flush=True)
    print(torch.__version__, "cpu" if cpu else torch.cuda.get_device_name(), sep="\t", flush=True)


def time_start(case: str, steps: int, cpu: bool, caches: str) -> tuple[list[float], str]:
    """(seconds from the command to the end of each step, versions). RuntimeError where it fails."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
    }
    command = [sys.executable, __file__, "--run", "--case", case, "--steps", str(steps)]
    times, last, began = [], "", time.perf_counter()
    with subprocess.Popen(
        [*command, *(["--cpu"] if cpu else [])],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ENDED):
                times.append(time.perf_counter() - began)
            last = line
    if process.returncode or len(times) != steps:
        raise RuntimeError(f"{case}: a start ended with {process.returncode} after {len(times)}")
    return times, " ".join(last.split("\t")).strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="Hydra overrides of one configuration")
    parser.add_argument("--steps", type=int, default=4, help="steps of each start (default 4)")
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for case in options.case or [DEFAULT]:
        if options.run:
            run_steps(case, options.steps, options.cpu)
            continue
        row: dict[str, Any] = {"case": case, "python": platform.python_version()}
        with tempfile.TemporaryDirectory() as caches:
            for kind in KINDS:
                times, row["versions"] = time_start(case, options.steps, options.cpu, caches)
                row[f"{kind} first step s"] = round(times[0], 1)
                row[f"{kind} step {options.steps} s"] = round(times[-1], 1)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
