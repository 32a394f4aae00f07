"""Training speed of any configuration: tokens/s, model TFLOP/s, peak memory, share of the loader.

    python scripts/bench_train.py                                  # the three single-GPU rows
    python scripts/bench_train.py --peer NANOGPT                   # and nanoGPT's, in the same run
    python scripts/bench_train.py --case "experiment=gpt_1.3b data.micro_batch_size=4"
    python scripts/bench_train.py --case "experiment=gpt2_124m data=shards data.path=FOLDER ..."
    torchrun --standalone --nproc-per-node 2 scripts/bench_train.py --case "... parallel=tensor2"

On random tokens, unless a case says data=shards. `data ms`: how long a step of the host waited for
its batch, while the GPU may have been busy with the step before: so the loader costs this much at
most. `loader tokens/s`: how fast this rank's loader gives batches when nothing else is done.
Times whole optimizer steps (loader, forward, backward, norm, clip, AdamW) with CUDA events after a
warm-up and reports medians. FLOPs per token: flashtrain/metrics.py.

--peer: a folder with nanoGPT's model.py. Its step (parts/training_peer.py) on as many made-up
tokens is timed after each case, once for cases of the same sizes, and the ratios are printed:
tokens/s, and peak memory.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.data.loader import DataLoader
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.metrics import flops_per_token
from flashtrain.parallel.mesh import mesh_of
from scripts.parts.training_peer import peer_step
from scripts.parts.where import where

ONE_GPU = [
    "experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 data.micro_batch_size=32",
    "experiment=gpt2_350m data.sequence_length=1024 data.batch_size=16 data.micro_batch_size=16",
    "experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 data.micro_batch_size=8",
]
COLUMNS = (
    "case", "ms/step", "tokens/s", "TFLOP/s/GPU", "peak GB", "reserved GB", "loss", "data ms",
    "data share", "loader tokens/s", "start s", "peer ms/step", "peer tokens/s", "peer peak GB",
    "peer loss", "speed ratio", "memory ratio", "error",
)  # fmt: skip
LOADER_SECONDS = 2.0


def read_case(case: str, steps: int) -> Config:
    world = dist.get_world_size() if dist.is_initialized() else 1
    overrides = [*case.split(), "data=random"] if "data=" not in case else case.split()
    return prepare_source(load([*overrides, f"trainer.steps={steps}"], world), world)


def measure(case: str, steps: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Medians of one configuration. Collective over the ranks."""
    began = time.perf_counter()
    config = read_case(case, steps + warmup)
    mesh = mesh_of(config.parallel)
    forget(device)
    engine = build_engine(config, mesh, device)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, device)
    marks = []

    def one(number: int) -> Any:
        if number == warmup:
            _wait(device)
            marks.extend([time.perf_counter() - began, loader.data_time])
        loss = engine.forward_backward(loader.step(number))
        engine.step(config.optimizer.lr * 0.1)
        return loss

    median, loss = time_steps(one, steps, warmup, device)
    started, waited = marks
    waited = (loader.data_time - waited) / steps * 1e3
    alone = loader_rate(loader, warmup + steps)
    loader.close()
    engine.close()
    tokens = config.data.batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, config.data.sequence_length)
    world = mesh.world_size
    return {
        "case": case,
        "ms/step": round(median, 2),
        "tokens/s": round(tokens / median * 1e3),
        "TFLOP/s/GPU": round(tokens / median * 1e3 * flops.full / world / 1e12, 1),
        "TFLOP/s/GPU causal once": round(tokens / median * 1e3 * flops.causal / world / 1e12, 1),
        **memory(device),
        "loss": round(float(loss), 4),
        "data ms": round(waited, 3),
        "data share": f"{waited / median:.2%}",
        "loader tokens/s": round(alone),
        "start s": round(started, 1),
        "world": world,
    }


def time_steps(
    one: Callable[[int], Any], steps: int, warmup: int, device: torch.device
) -> tuple[float, Any]:
    """(median ms, what the last step returned) of `steps` steps after `warmup` others."""
    times, on_gpu = [], device.type == "cuda"
    result = None
    for number in range(warmup + steps):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = one(number)
            end.record()
            times.append((begin, end))
        else:
            at = time.perf_counter()
            result = one(number)
            times.append(time.perf_counter() - at)
    _wait(device)
    timed = (
        [begin.elapsed_time(end) for begin, end in times] if on_gpu else [1e3 * t for t in times]
    )
    return statistics.median(timed[warmup:]), result


def race(
    case: str, folder: Path, steps: int, warmup: int, device: torch.device,
    raced: dict[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """nanoGPT's figures for the same sizes, from `raced` where it has run them, which is kept."""
    config = read_case(case, steps + warmup)
    data = config.data
    sizes = repr((
        config.model, data.batch_size, data.micro_batch_size, data.sequence_length,
        config.precision.compute, config.optimizer.name, config.optimizer.clip_norm,
    ))  # fmt: skip
    if sizes in raced:
        return raced[sizes]
    if dist.is_initialized():
        raise ConfigError(f"--peer {folder}: nanoGPT is raced on one GPU, without torchrun")
    forget(device)
    step = peer_step(folder, config, device)
    loader = open_loader(config, 0, 1, device)
    with loader:
        median, loss = time_steps(lambda n: step(loader.step(n)), steps, warmup, device)
    tokens = config.data.batch_size * config.data.sequence_length
    raced[sizes] = {
        "peer ms/step": round(median, 2),
        "peer tokens/s": round(tokens / median * 1e3),
        **{f"peer {key}": value for key, value in memory(device).items()},
        "peer loss": round(float(loss), 4),
    }
    return raced[sizes]


def with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    row["speed ratio"] = round(row["peer ms/step"] / row["ms/step"], 3)
    if row.get("peer peak GB"):
        row["memory ratio"] = round(row["peak GB"] / row["peer peak GB"], 3)
    return row


def memory(device: torch.device) -> dict[str, float]:
    """Peaks since `forget`. `reserved` holds what the allocator and CUDA graphs keep, too."""
    if device.type != "cuda":
        return {}
    return {
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def forget(device: torch.device) -> None:
    """What ran before leaves nothing in memory, and no compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loader_rate(loader: DataLoader, step: int) -> float:
    """Tokens per second of this rank's loader from `step` on, the copy to the GPU included."""
    loader.step(step)
    tokens, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < LOADER_SECONDS:
        step += 1
        tokens += sum(batch.tokens.numel() for batch in loader.step(step))
    return tokens / spent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="Hydra overrides of one configuration")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    parser.add_argument("--warmup", type=int, default=6, help="untimed steps first (default 6)")
    parser.add_argument("--peer", type=Path, help="folder with nanoGPT's model.py, to race with")
    parser.add_argument("--cpu", action="store_true", help="for tests of this script")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.cpu:
        print("bench_train: needs a CUDA GPU, none is visible", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    if not options.cpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rank = int(os.environ.get("RANK", 0))
    rows: list[dict[str, Any]] = []
    raced: dict[str, dict[str, Any]] = {}

    def keep(row: dict[str, Any]) -> None:
        """What is known is shown and written at once: a run may be cut short."""
        if rank == 0:
            print("  ".join(f"{key} {row[key]}" for key in COLUMNS if key in row), flush=True)
            if options.json:
                found = {"environment": where(), "rows": rows}
                options.json.write_text(json.dumps(found, indent=2))

    for case in options.case or ONE_GPU:
        row: dict[str, Any] = {"case": case}
        rows.append(row)
        try:
            row |= measure(case, options.steps, options.warmup, device)
            keep(row)
            if options.peer is not None:
                its = race(case, options.peer, options.steps, options.warmup, device, raced)
                before = set(row)
                row |= with_ratios(row | its)
                keep({key: value for key, value in row.items() if key not in before})
        except (ConfigError, torch.OutOfMemoryError) as error:
            row["error"] = str(error).splitlines()[0]
            keep(row)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
