"""Speed of attention over a sequence that several GPUs hold in parts.

    torchrun --nproc-per-node 2 scripts/bench_context.py
    torchrun --nproc-per-node 2 scripts/bench_context.py --lengths 131072 --kinds ring --json a.json

bf16, causal, one sequence; heads of gpt_1.3b by default. Each length runs whole on one GPU (every
rank times its own), then in each form over all ranks. FLOPs: forward 4 H T T D / 2, backward 2.5 x
forward. Times are medians by CUDA events, those of the slowest rank. Share: the rate per GPU to
that of one GPU alone.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.parallel.context import gather_attention, own_part, ulysses_attention
from flashtrain.parallel.mesh import build_mesh
from flashtrain.parallel.ring import ring_attention
from kernels.attention import attention

FORMS: dict[str, Callable[..., Tensor]] = {
    "gather": gather_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of some calls on the slowest rank, after two to warm up. Collective."""
    times = []
    for _ in range(2 + repeats):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    slowest = torch.tensor(statistics.median(times[2:]), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def measure(
    form: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor, repeats: int
) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of one with its backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            form(*leaves)

    def both() -> None:
        torch.autograd.grad(form(*leaves), leaves, d_out)

    return milliseconds(forward, repeats), milliseconds(both, repeats)


def rows_of(length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for one GPU alone and one for each form."""
    size = dist.get_world_size()
    axis = build_mesh(1, context=size).context
    draw = torch.Generator("cuda").manual_seed(0)
    heads, narrow, width = arguments.heads, arguments.kv_heads or arguments.heads, arguments.width
    whole = [
        torch.randn(1, length, n, width, generator=draw, device="cuda", dtype=torch.bfloat16)
        for n in (heads, narrow, narrow, heads)
    ]
    flops = 2 * heads * width * length**2
    forms: dict[str, Callable[..., Tensor]] = {"one GPU": partial(attention, causal=True)}
    for kind in arguments.kinds:
        forms[kind] = partial(
            FORMS[kind], axis=axis, alibi_slopes=None, documents=None, backend="auto"
        )
    rows: list[dict[str, Any]] = []
    for name, form in forms.items():
        ranks = 1 if name == "one GPU" else size
        *inputs, d_out = whole if ranks == 1 else [own_part(x, axis) for x in whole]
        torch.cuda.reset_peak_memory_stats()
        forward, both = measure(form, inputs, d_out, arguments.repeats)
        rates = [flops / ranks / forward / 1e9, 3.5 * flops / ranks / both / 1e9]
        alone = rows[0] if rows else {"forward TFLOP/s": rates[0], "both TFLOP/s": rates[1]}
        rows.append(
            {
                "tokens": length,
                "form": name,
                "forward ms": forward,
                "both ms": both,
                "forward TFLOP/s": rates[0],
                "both TFLOP/s": rates[1],
                "forward share": rates[0] / alone["forward TFLOP/s"],
                "both share": rates[1] / alone["both TFLOP/s"],
                "peak GB": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[65536, 262144],
        help="tokens (default 65536 262144)",
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=FORMS, default=list(FORMS), help="default: all"
    )
    parser.add_argument("--heads", type=int, default=16, help="of queries (default 16)")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed calls, of which the median counts (default 5)"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    first = dist.get_rank() == 0
    if first:
        print(
            f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, "
            f"{arguments.heads} heads of {arguments.width}"
        )
    found = []
    for length in arguments.lengths:
        for row in rows_of(length, arguments):
            found.append(row)
            if first:
                numbers = (f"{key} {value:.3g}" for key, value in list(row.items())[2:])
                print(f"{length:>8} {row['form']:<8}", *numbers, sep="  ", flush=True)
    if first and arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
