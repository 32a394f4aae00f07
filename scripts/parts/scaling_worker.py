"""One rank of a measurement by bench_scaling.py: times optimizer steps of one case after the other.

    torchrun ... scripts/parts/scaling_worker.py --cases CASES --rows ROWS --steps 10 --warmup 5

CASES is JSON, a list of lists of Hydra overrides; rank 0 appends a line of JSON to ROWS after each.
What a case leaves (memory, groups, compiled code) is given back before the next. Steps are whole
(loader, forward, backward, norm, clip, update); the median is of CUDA events on GPUs and of the
host's clock without. Peak memory is the fullest rank's.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.parallel.mesh import Mesh, mesh_of


class Clock:
    """Marks in the device's time where there is a GPU, else in the host's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each two marks; waits for the device."""
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if not self.cuda:
            return [(end - begin) * 1e3 for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def measure(overrides: list[str], steps: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Collective over the ranks."""
    began, world = time.perf_counter(), dist.get_world_size()
    config = load([*overrides, f"trainer.steps={warmup + steps}"], world)
    config = prepare_source(config, world)
    mesh = mesh_of(config.parallel)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine = build_engine(config, mesh, device)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, device)
    clock, losses = Clock(device), []
    for step in range(warmup + steps):
        if step == warmup:
            float(losses[-1])  # waits for what is under way
            started = time.perf_counter() - began
        if step >= warmup:
            clock.mark()
        losses.append(engine.forward_backward(loader.step(step)).detach())
        engine.step(config.optimizer.lr * 0.1)
    clock.mark()
    median = statistics.median(clock.milliseconds())
    loader.close()
    peak = torch.tensor(
        torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        dtype=torch.float64, device=device,
    )  # fmt: skip
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    engine.close()
    del engine
    forget(mesh, device)
    rate = config.data.batch_size * config.data.sequence_length / median * 1e3
    return {
        "ms/step": round(median, 2),
        "tokens/s": round(rate),
        "tokens/s/GPU": round(rate / world),
        "peak GB": round(float(peak) / 1e9, 2),
        "start s": round(started, 1),
        "losses": [float(loss) for loss in losses],
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def forget(mesh: Mesh, device: torch.device) -> None:
    """Give back what a case took; only the group of all ranks stays. Collective."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    groups = {id(g): g for g in (getattr(axis, "group", None) for axis in vars(mesh).values()) if g}
    groups.pop(id(dist.group.WORLD), None)
    dist.barrier()
    for group in groups.values():
        dist.destroy_process_group(group)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, required=True, help="what to measure")
    parser.add_argument("--rows", type=Path, required=True, help="where results go")
    parser.add_argument("--steps", type=int, required=True, help="timed")
    parser.add_argument("--warmup", type=int, required=True, help="1 or more")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    for overrides in json.loads(options.cases.read_text()):
        row = measure(overrides, options.steps, options.warmup, device)
        if dist.get_rank() == 0:
            with options.rows.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
