"""Training speed of any configuration: tokens/s, model TFLOP/s, peak memory, share of the loader.

    python scripts/bench_train.py                                  # the three single-GPU rows
    python scripts/bench_train.py --case "experiment=gpt_1.3b data.micro_batch_size=4"
    python scripts/bench_train.py --case "experiment=gpt2_124m data=shards data.path=FOLDER ..."
    torchrun --standalone --nproc-per-node 2 scripts/bench_train.py --case "... parallel=tensor2"

On random tokens, unless a case says data=shards. `data ms`: how long a step of the host waited for
its batch, while the GPU may have been busy with the step before: so the loader costs this much at
most. `loader tokens/s`: how fast this rank's loader gives batches when nothing else is done.
Times whole optimizer steps (loader, forward, backward, norm, clip, AdamW) with CUDA events after a
warm-up and reports medians. FLOPs per token: flashtrain/metrics.py.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.data.loader import DataLoader
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.metrics import flops_per_token
from flashtrain.parallel.mesh import mesh_of

ONE_GPU = [
    "experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 data.micro_batch_size=32",
    "experiment=gpt2_350m data.sequence_length=1024 data.batch_size=16 data.micro_batch_size=16",
    "experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 data.micro_batch_size=8",
]
COLUMNS = (
    "case", "ms/step", "tokens/s", "TFLOP/s/GPU", "peak GB", "loss", "data ms", "data share",
    "loader tokens/s", "start s",
)  # fmt: skip
LOADER_SECONDS = 2.0


def measure(case: str, steps: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Medians of one configuration. Collective over the ranks."""
    began = time.perf_counter()
    world = dist.get_world_size() if dist.is_initialized() else 1
    overrides = [*case.split(), "data=random"] if "data=" not in case else case.split()
    config = load([*overrides, f"trainer.steps={steps + warmup}"], world)
    config = prepare_source(config, world)
    mesh = mesh_of(config.parallel)
    torch.cuda.reset_peak_memory_stats()
    engine = build_engine(config, mesh, device)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, device)
    times = []
    for step in range(warmup + steps):
        if step == warmup:
            torch.cuda.synchronize()
            started = time.perf_counter() - began
            waited = loader.data_time
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loss = engine.forward_backward(loader.step(step))
        engine.step(config.optimizer.lr * 0.1)
        end.record()
        if step >= warmup:
            times.append((begin, end))
    torch.cuda.synchronize()
    waited = (loader.data_time - waited) / steps * 1e3
    alone = loader_rate(loader, warmup + steps)
    loader.close()
    median = statistics.median(begin.elapsed_time(end) for begin, end in times)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, config.data.sequence_length)
    return {
        "case": case,
        "ms/step": round(median, 2),
        "tokens/s": round(tokens / median * 1e3),
        "TFLOP/s/GPU": round(tokens / median * 1e3 * flops.full / world / 1e12, 1),
        "TFLOP/s/GPU causal once": round(tokens / median * 1e3 * flops.causal / world / 1e12, 1),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss": round(float(loss), 4),
        "data ms": round(waited, 3),
        "data share": f"{waited / median:.2%}",
        "loader tokens/s": round(alone),
        "start s": round(started, 1),
        "world": world,
    }


def loader_rate(loader: DataLoader, step: int) -> float:
    """Tokens per second of this rank's loader from `step` on, the copy to the GPU included."""
    loader.step(step)
    tokens, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < LOADER_SECONDS:
        step += 1
        tokens += sum(batch.tokens.numel() for batch in loader.step(step))
    return tokens / spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", help="Hydra overrides of one configuration")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    parser.add_argument("--warmup", type=int, default=6, help="untimed steps first (default 6)")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_train: needs a CUDA GPU, none is visible", file=sys.stderr)
        return 2
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl", device_id=device)
    rank = int(os.environ.get("RANK", 0))
    rows = []
    for case in options.case or ONE_GPU:
        try:
            row = measure(case, options.steps, options.warmup, device)
        except (ConfigError, torch.OutOfMemoryError) as error:
            row = {"case": case, "error": str(error).splitlines()[0]}
        rows.append(row)
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        if rank == 0:
            print(
                "  ".join(f"{key} {row[key]}" for key in COLUMNS if key in row) or row, flush=True
            )
            if "error" in row:
                print(f"  {row['error']}", flush=True)
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if rank == 0 and options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
