"""What tensor parallelism costs a layer: products with their transfers, and products alone.

    torchrun --nproc-per-node 2 scripts/bench_tensor_parallel.py
    torchrun --nproc-per-node 2 scripts/bench_tensor_parallel.py --chunks 1 2 4 --json a.json

bf16, every linear layer of a block, forward and backward (both gradients), in ms: the mean of some
calls in a row, which a sleeping kernel lets the host queue beforehand, as in a training step; the
slowest rank's, the median of some rounds. `product`: the same products without a transfer, which
no form can beat. `transfer`: NCCL's gather or scatter alone, forward. Forms: plain (NCCL, then the
product), fused (torch.ops.symm_mem), stream N and kernel N (pipelined, N pieces a part, two kinds
of flags: flashtrain/parallel/peer_memory.py). Each form's results are held against those of plain:
the worst relative difference, in the 2-norm, is printed; bf16 sums in another order differ by 4e-3.
"""

import argparse
import faulthandler
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from flashtrain.config import Overlap
from flashtrain.parallel import pipelined
from flashtrain.parallel.collectives import gather_sequence, scatter_sequence
from flashtrain.parallel.mesh import Axis, build_mesh
from flashtrain.parallel.overlap import Form, choose_form, gather_linear, linear_scatter
from flashtrain.parallel.peer_memory import FLAGS, PeerMemory
from flashtrain.parallel.transport import use_transport

# batch, length; layer: (whether it gathers or scatters, input and output features of all ranks)
MODELS: dict[str, tuple[int, int, dict[str, tuple[str, int, int]]]] = {
    "gpt_1.3b": (
        8,
        2048,
        {
            "qkv": ("gather", 2048, 6144),
            "out": ("scatter", 2048, 2048),
            "up": ("gather", 2048, 8192),
            "down": ("scatter", 8192, 2048),
        },
    ),
    "llama_8b": (
        2,
        8192,
        {
            "qkv": ("gather", 4096, 6144),
            "out": ("scatter", 4096, 4096),
            "gate_up": ("gather", 4096, 28672),
            "down": ("scatter", 14336, 4096),
        },
    ),
}
SLEEP = 40_000_000  # cycles, about 20 ms: longer than the host takes to queue a round
LIMIT = 240  # seconds; a rank that waits for ever shows where

Step = Callable[[], object]


def milliseconds(run: Step, calls: int, rounds: int) -> float:
    """Collective."""
    times = []
    for _ in range(1 + rounds):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    slowest = torch.tensor(statistics.median(times[1:]), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The worst relative difference on any rank. Collective."""
    errors = [
        torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float())
        for a, b in zip(ours, theirs, strict=True)
    ]
    worst = torch.stack(errors).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


class Layer:
    """One rank's tensors of a layer, equal in every form."""

    def __init__(self, model: str, name: str, axis: Axis) -> None:
        batch, length, layers = MODELS[model]
        self.kind, inside, outside = layers[name]
        self.gathers, self.axis = self.kind == "gather", axis
        part, n = length // axis.size, axis.size
        draw = torch.Generator("cuda").manual_seed(axis.rank)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device="cuda").bfloat16()

        if self.gathers:
            x, weight = random(batch, part, inside), random(outside // n, inside)
            self.whole, self.grad = (
                random(batch, length, inside),
                random(batch, length, outside // n),
            )
        else:
            x, weight = random(batch, length, inside // n), random(outside, inside // n)
            self.whole, self.grad = x, random(batch, part, outside)
        self.x, self.weight = x.requires_grad_(), (weight / inside**0.5).requires_grad_()

    def run(self, form: Form) -> Tensor:
        if self.gathers:
            return gather_linear(self.x, self.weight, None, self.axis, form)
        return linear_scatter(self.x, self.weight, self.axis, form)

    def results(self, form: Form) -> list[Tensor]:
        y = self.run(form)
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.weight), self.grad)]

    def timed(self, form: Form, calls: int, rounds: int) -> dict[str, float]:
        def forward() -> None:
            with torch.no_grad():
                self.run(form)

        y = self.run(form)

        def backward() -> None:
            torch.autograd.grad(y, (self.x, self.weight), self.grad, retain_graph=True)

        return {
            "forward": milliseconds(forward, calls, rounds),
            "backward": milliseconds(backward, calls, rounds),
        }

    def alone(self, calls: int, rounds: int) -> dict[str, float]:
        """The products, and the transfer, each without the other."""
        x = self.whole.detach().requires_grad_()
        y = F.linear(x, self.weight)
        grad = torch.ones_like(y)

        def forward() -> None:
            with torch.no_grad():
                F.linear(x, self.weight)

        def backward() -> None:
            torch.autograd.grad(y, (x, self.weight), grad, retain_graph=True)

        def transfer() -> None:
            with torch.no_grad():
                gather_sequence(self.x, self.axis) if self.gathers else scatter_sequence(
                    grad, self.axis
                )

        return {
            "forward": milliseconds(forward, calls, rounds),
            "backward": milliseconds(backward, calls, rounds),
            "transfer": milliseconds(transfer, calls, rounds),
        }


def forms(axis: Axis, device: torch.device, chunks: list[int]) -> dict[str, Callable[[], Form]]:
    """Name -> what sets it up."""
    assert axis.group is not None
    made: dict[str, Callable[[], Form]] = {
        "plain": lambda: Form.plain,
        "fused": lambda: choose_form(axis, Overlap.fused, device),
    }
    for flags in FLAGS:
        transport = PeerMemory(axis.group, device, flags)
        for count in chunks:

            def set_up(transport: PeerMemory = transport, count: int = count) -> Form:
                pipelined.CHUNKS = count
                use_transport(axis.name, transport)
                return Form.pipelined

            made[f"{flags} {count}"] = set_up
    return made


def rows_of(
    layer: Layer, made: dict[str, Callable[[], Form]], arguments: Any
) -> list[dict[str, Any]]:
    calls, rounds = arguments.calls, arguments.rounds
    rows: list[dict[str, Any]] = [{"form": "product", **layer.alone(calls, rounds)}]
    plain = layer.results(Form.plain)
    for name, set_up in made.items():
        try:
            form = set_up()
            difference_of = difference(layer.results(form), plain)
            rows.append({"form": name, **layer.timed(form, calls, rounds)})
            rows[-1]["difference"] = difference_of
        except (RuntimeError, ValueError) as error:  # of all ranks alike: the others go on
            rows.append({"form": name, "failed": f"{type(error).__name__}: {error}"})
    return rows


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['form']:<10} {row['failed'].splitlines()[0][:150]}"
    numbers = "".join(
        f"  {key} {row[key]:.2g}" if key == "difference" else f"  {key} {row[key]:7.3f}"
        for key in ("forward", "backward", "transfer", "difference")
        if key in row
    )
    return f"{row['form']:<10}{numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="whose layers (default: all)",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="pieces in which a part travels (default 1 2 4)",
    )
    parser.add_argument(
        "--calls", type=int, default=10, help="in a row, of which the mean counts (default 10)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of those, of which the median counts (default 3)"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    axis = build_mesh(dist.get_world_size()).tensor
    first = dist.get_rank() == 0
    if first:
        print(f"{axis.size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, ms")
    made = forms(axis, device, arguments.chunks)
    found: list[dict[str, Any]] = []
    for model in arguments.models:
        sums: dict[str, list[float]] = {}
        for name in MODELS[model][2]:
            for row in rows_of(Layer(model, name, axis), made, arguments):
                found.append({"model": model, "layer": name, **row})
                if "failed" not in row:
                    sums.setdefault(row["form"], []).append(row["forward"] + row["backward"])
                if first:
                    print(f"{model:<9} {name:<8} {line(row)}", flush=True)
        for form, times in sums.items():
            found.append({"model": model, "layer": "block", "form": form, "both": sum(times)})
            if first:
                print(f"{model:<9} {'block':<8} {form:<10}  both {sum(times):7.3f}", flush=True)
    if first and arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
