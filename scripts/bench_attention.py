"""Speed and error of attention beside its peers.

    python scripts/bench_attention.py                       # every shape, every backend found here
    python scripts/bench_attention.py --head-sizes 128 --lengths 4096 --backends triton cudnn
    python scripts/bench_attention.py --lengths 512 1024 2048 --graph     # without the host's part
    python scripts/bench_attention.py --from attention.json --plot attention.png      # no GPU

bf16, 16k tokens in all, hidden width 2048 (heads = 2048 / D). Masks: causal and full at every
length; at the longest also a causal window of 1024 keys and packed documents of 512 tokens on
average. FLOPs: forward 4 B H S S D, half when causal, with the queries and keys that meet under the
other masks; backward 2.5 x forward. Times are medians by CUDA events, L2 flushed between calls; in
--graph mode of ten calls in one CUDA graph, L2 warm. Errors: head 0 of batch 0 against float64;
`x eager` divides by the error of eager PyTorch in bf16. Last come rows of decoding, at batch 64 and
8,192 cached tokens, 32/8 heads; more of it: bench_decode.py.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor

from kernels.attention.reference import attention_reference
from scripts.parts.attention_peers import BACKENDS, MASKS, Call, Shape
from scripts.parts.scaling_plot import pyplot
from scripts.parts.where import where

GRAPH_CALLS = 10  # in one CUDA graph
DECODE = "decode"  # a row of another kind


def milliseconds(function: Callable[[], Any], warmup: int = 25, rep: int = 60) -> float:
    """Median time of a call on the GPU."""
    median: float = triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")
    return median


def milliseconds_in_graph(function: Callable[[], Any]) -> float:
    """Median time of a call inside a CUDA graph of GRAPH_CALLS; not on the default stream."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(GRAPH_CALLS):
            function()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / GRAPH_CALLS)
    return statistics.median(times[2:])


def fresh(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """q, k, v that want gradients, and the gradient of out."""
    torch.manual_seed(0)
    make = dict(dtype=torch.bfloat16, device="cuda")
    leaves = [torch.randn(shape.sizes, **make).requires_grad_() for _ in range(3)]
    return leaves, torch.randn(shape.sizes, **make)


def measure(call: Call, shape: Shape, check: "Check | None", graph: bool) -> dict[str, float]:
    """TFLOP/s of both passes, and errors."""
    stream = torch.cuda.Stream() if graph else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward runs where forward did, and has to be captured
        return _measure(call, shape, check, milliseconds_in_graph if graph else milliseconds)


def _measure(
    call: Call, shape: Shape, check: "Check | None", clock: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    leaves, d_out = fresh(shape)
    out = call(*leaves)
    found = {}
    if check is not None:
        grads = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        found = check.errors([out.detach(), *grads])

    def back() -> None:
        torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    with torch.no_grad():
        forward_ms = clock(lambda: call(*leaves))
    backward_ms = clock(back)
    return {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward": shape.forward_flops / forward_ms / 1e9,
        "backward": 2.5 * shape.forward_flops / backward_ms / 1e9,
        **found,
    }


class Check:
    """Exact and eager results of head 0 of batch 0: float64 scores of 16k x 16k take 2 GB each."""

    NAMES = ("out", "dq", "dk", "dv")

    def __init__(self, shape: Shape) -> None:
        leaves, d_out = fresh(shape)
        leaves = [self.head(x.detach()) for x in leaves]
        d_out = self.head(d_out)
        options = dict(shape.options)
        if "documents" in options:
            options["documents"] = options["documents"][:1]
        self.exact = self.results(leaves, d_out, options, torch.float64)
        eager = self.results(leaves, d_out, options, torch.bfloat16)
        self.eager = [self.error(x, y) for x, y in zip(eager, self.exact, strict=True)]

    @staticmethod
    def head(x: Tensor) -> Tensor:
        return x[:1, :, :1]

    @staticmethod
    def error(x: Tensor, exact: Tensor) -> float:
        return (x.double() - exact).abs().max().item()

    @staticmethod
    def results(
        leaves: list[Tensor], d_out: Tensor, options: dict[str, Any], dtype: torch.dtype
    ) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in leaves]
        out, _ = attention_reference(*given, **options, compute=dtype)
        return [out.detach(), *torch.autograd.grad(out, given, d_out.to(out.dtype))]

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        found = [self.error(self.head(x), y) for x, y in zip(results, self.exact, strict=True)]
        ratio = max(x / base for x, base in zip(found, self.eager, strict=True))
        named = {f"error_{n}": x for n, x in zip(self.NAMES, found, strict=True)}
        return {**named, "error_over_eager": ratio}


def compare(args: argparse.Namespace, rows: list[dict[str, Any]], keep: Callable[[], None]) -> None:
    """Every backend at every shape into `rows`; prints a row each, and keeps them shape by shape: a
    run takes minutes, and one that is ended early has measured what it has."""
    refused = set()
    print(f"{'shape':24} {'backend':8} {'fwd':>6} {'bwd':>6} TFLOP/s  {'fwd ms':>7} {'bwd ms':>7}"
          f"  {'out err':>8} {'grad err':>8} {'x eager':>7}")  # fmt: skip
    for shape in shapes(args):
        check = None if args.no_errors else Check(shape)
        for name in args.backends:
            if name == "flex" and not shape.causal and not args.flex_full:
                continue  # half a minute of compiling for what is plain attention
            try:
                call = BACKENDS[name](shape)
                found = call if isinstance(call, str) else measure(call, shape, check, args.graph)
            except Exception as failure:  # a peer may refuse a shape; the others still count
                found = f"{type(failure).__name__}: {failure}".splitlines()[0]
            if isinstance(found, str):
                if (name, found) not in refused:
                    print(f"{shape!s:24} {name:8} {found}")
                refused.add((name, found))
                continue
            gradients = max(found.get(f"error_{n}", 0.0) for n in ("dq", "dk", "dv"))
            print(
                f"{shape!s:24} {name:8} {found['forward']:6.0f} {found['backward']:6.0f}         "
                f" {found['forward_ms']:7.3f} {found['backward_ms']:7.3f}"
                f"  {found.get('error_out', 0.0):8.1e} {gradients:8.1e}"
                f" {found.get('error_over_eager', 0.0):7.2f}",
                flush=True,
            )
            rows.append({**asdict(shape), "backend": name, **found})
        del check
        torch.cuda.empty_cache()
        keep()


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Every mask that was asked for; window and documents at the longest length only."""
    found = []
    masks = [mask for mask in args.masks if mask != DECODE]
    for head_size, mask in itertools.product(args.head_sizes, masks):
        lengths = args.lengths if mask in ("causal", "full") else [max(args.lengths)]
        found += [Shape(head_size, mask, length) for length in lengths]
    return found


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Our two layouts and the peers at one shape per head size; prints a row each."""
    import bench_decode  # which imports this file

    peers = [name for name in args.backends if name in bench_decode.PEERS]
    wanted = dict(layouts=["contiguous", "paged"], page=64, peers=peers, ragged=False, rep=20)
    copy = bench_decode.copy_bandwidth(20)
    print(f"decoding; a copy runs at {copy:.0f} GB/s")
    shapes = [bench_decode.Shape(64, 8192, 32, 8, D, 1) for D in args.head_sizes]
    rows = bench_decode.compare(argparse.Namespace(**wanted), shapes, copy)
    return {"copy_gb_per_s": copy, "rows": rows}


def plot(result: dict[str, Any], path: Path) -> None:
    """TFLOP/s over sequence length: a row of panels per pass, a panel per head size and mask."""
    plt = pyplot()
    rows = [row for row in result["rows"] if row["mask"] in ("causal", "full")]
    panels = sorted({(row["head_size"], row["mask"]) for row in rows})
    figure, axes = plt.subplots(2, len(panels), figsize=(3.6 * len(panels), 6), squeeze=False)
    for (head_size, mask), column in zip(panels, axes.T, strict=True):
        for axis, passing in zip(column, ("forward", "backward"), strict=True):
            for backend in BACKENDS:
                points = sorted(
                    (row["length"], row[passing])
                    for row in rows
                    if (row["head_size"], row["mask"], row["backend"]) == (head_size, mask, backend)
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=backend)
            axis.set(title=f"{passing}, D={head_size}, {mask}", ylim=(0, None))
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("TFLOP/s")
    axes[1, 0].set_ylabel("TFLOP/s")
    axes[0, 0].legend()
    about = result["environment"]
    figure.suptitle(f"{about['gpu']}, {about['date']}, bf16, 16k tokens, over sequence length")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--head-sizes", type=int, nargs="+", default=[64, 128], help="default 64 128")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 4096, 16384],
        help="default 1024 4096 16384",
    )
    masks = [*MASKS, DECODE]
    add("--masks", nargs="+", choices=masks, default=masks, help="default: all")
    add(
        "--backends",
        nargs="+",
        choices=list(BACKENDS),
        default=list(BACKENDS),
        help="default: all that run here",
    )
    add("--flex-full", action="store_true", help="time FlexAttention without a mask too")
    add("--no-errors", action="store_true", help="time only")
    add("--graph", action="store_true", help="time calls inside a CUDA graph")
    add("--json", type=Path, help="write the rows there")
    add("--plot", type=Path, help="draw the rows there (needs matplotlib)")
    add("--from", type=Path, dest="source", help="draw this JSON instead of measuring")
    args = parser.parse_args()
    if args.plot:
        try:
            pyplot()  # refused now and not after the runs
        except ValueError as error:
            parser.error(str(error))
    if args.source is not None:
        if args.plot is None:
            parser.error("--from FILE is drawn: give --plot PATH too")
        plot(json.loads(args.source.read_text()), args.plot)
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, torch sees none")
    about, began = (
        where("flash_attn") | {"cudnn": str(torch.backends.cudnn.version())},
        time.perf_counter(),
    )
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows: list[dict[str, Any]] = []
    result = {"environment": about, "graph": args.graph, "rows": rows}

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    compare(args, rows, keep)
    if DECODE in args.masks:
        result["decoding"] = decoding(args)
        keep()
    print(f"{time.perf_counter() - began:.0f} s")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
