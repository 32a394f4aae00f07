"""fp8 linear layers beside bf16 on one GPU: products, casts, layers, compiled blocks.

    python scripts/bench_fp8.py                                   # all models, all but blocks
    python scripts/bench_fp8.py --parts blocks --models gpt_1.3b  # which casts serve compiled code
    python scripts/bench_fp8.py --sweep                           # tiles of the cast kernels

    products  the three matrix products of a layer alone, bf16 and fp8, fast accumulation or not
    sums      Y of the layers that end in the residual stream, bias too where the model has one:
              product alone, product then sum, and kernels.linear.add_float8_product; as CUDA graphs
    casts     our kernels and PyTorch's operations under torch.compile, GB/s of bytes read + written
    layers    forward and backward of one linear layer, eager, casts included, weight cast once
    blocks    forward and backward of one transformer block under torch.compile, by kind of casts:
              auto, torch (all left to the compiler), triton (our kernels for everything)

    models    gpt2_124m, gpt2_350m, gpt_1.3b, llama_8b

TFLOP/s count the products' 2 M N K each, the same for bf16 and fp8. Times are medians; the device
is kept busy while the host fills its queue, so they hold no launch gaps. Errors: norm of the
difference to an fp32 product of the same bf16 operands, over the norm of that product.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flashtrain.compose import load
from flashtrain.config import Config, LinearKind, PrecisionConfig
from flashtrain.model.float8 import refresh_weights, use_float8
from flashtrain.model.float8_product import Float8Product, Recipe
from flashtrain.model.gpt import GPT
from flashtrain.model.linear import Linear
from kernels.fp8_cast import E4M3, E5M2
from scripts.parts.fp8_casts import Timed, shipped, tiles
from scripts.parts.fp8_sums import onto_stream
from scripts.parts.graph_timing import microseconds
from scripts.parts.where import where

TOKENS = {
    "gpt2_124m": (32, 1024),
    "gpt2_350m": (16, 1024),
    "gpt_1.3b": (8, 2048),
    "llama_8b": (1, 8192),
}
PARTS = ("products", "sums", "casts", "layers", "blocks")
FORMS: dict[str, Recipe | None] = {
    "bf16": None,
    "tensorwise": Recipe(),
    "tensorwise, fast backward": Recipe(fast_backward=True),
    "rowwise": Recipe(rowwise=True),
}
BLOCK_FORMS: dict[str, Recipe | None] = {
    "bf16": None,
    **{f"tensorwise {cast}": Recipe(backend=cast) for cast in ("auto", "torch", "triton")},
    **{f"rowwise {cast}": Recipe(rowwise=True, backend=cast) for cast in ("auto", "triton")},
}
SLEEP = 20_000_000  # clock cycles, about 10 ms: longer than the host takes to queue `CALLS` calls
CALLS = 6
GROUPS = 3


@dataclass(frozen=True)
class Shape:
    """A layer: M tokens, K input and N output features."""

    model: str
    layer: str
    M: int
    K: int
    N: int
    biased: bool

    def __str__(self) -> str:
        return f"{self.model:9} {self.layer:7} {self.M:5} x {self.K:5} -> {self.N:5}"


def config_of(model: str) -> Config:
    batch, length = TOKENS[model]
    sizes = [f"data.sequence_length={length}", f"data.batch_size={batch}"]
    overrides = [f"model={model}", "data=random", *sizes, f"data.micro_batch_size={batch}"]
    if model.startswith("gpt2"):
        overrides.append("position=gpt2")
    return load([*overrides, "model.vocabulary=50304", "model.n_layers=1"])


def dense(model: str) -> GPT:
    """One block of the model, on the meta device."""
    config = config_of(model)
    length = config.data.sequence_length
    with torch.device("meta"):
        return GPT(config.model, config.position, length, dtype=torch.bfloat16)


def shapes(models: list[str]) -> Iterator[Shape]:
    for model in models:
        batch, length = TOKENS[model]
        for name, layer in dense(model).blocks[0].named_modules():
            if isinstance(layer, Linear):
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                yield Shape(model, name.rpartition(".")[2], batch * length, *sizes)


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the device."""
    for _ in range(2):
        call()
    times = []
    for _ in range(GROUPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def row(title: str, **figures: Any) -> dict[str, Any]:
    """Print a line of the table and return it."""
    cells = []
    for name, value in figures.items():
        if isinstance(value, float):
            kind = "error" if name.startswith("error") else name[-2:]
            digits = {"error": 4, "ms": 3, "us": 1}.get(kind, 0)
            value = f"{value:.{digits}f}"
        cells.append(f"{name} {value}")
    print(f"{title:60} " + "  ".join(cells), flush=True)
    return figures


def products(shape: Shape) -> Iterator[dict[str, Any]]:
    """Y, dX and dW of bf16 and of fp8 operands that are there already."""
    M, K, N = shape.M, shape.K, shape.N
    flops = 2 * M * N * K / 1e9  # over ms: TFLOP/s
    x, w, dy = (torch.randn(s, device="cuda").bfloat16() for s in ((M, K), (N, K), (M, N)))
    one = torch.ones((), device="cuda")
    # what each sums over, by rows of both operands: a [m, k] b [n, k]
    operands = {"Y": (x, w), "dX": (dy, w.t()), "dW": (dy.t(), x.t())}
    for name, (a, b) in operands.items():
        ms = median_ms(partial(torch.mm, a, b.t()))
        title = f"{shape}  {name}"
        yield {"product": name, "form": "bf16", **row(f"{title} bf16", ms=ms, tflops=flops / ms)}
        a_type = E4M3 if name == "Y" else E5M2
        for kind, fast in ((k, f) for k in ("tensorwise", "rowwise") for f in (True, False)):
            if kind == "rowwise" and name == "dW":
                continue
            a8 = a.contiguous().to(a_type if kind == "tensorwise" else E4M3)
            b8 = b.contiguous().to(E4M3)
            scales = one, one
            if kind == "rowwise":
                scales = (
                    torch.ones(a8.size(0), 1, device="cuda"),
                    torch.ones(1, b8.size(0), device="cuda"),
                )
            dtype = torch.float32 if name == "dW" else torch.bfloat16
            ms = median_ms(
                partial(
                    torch._scaled_mm, a8, b8.t(), scale_a=scales[0], scale_b=scales[1],
                    out_dtype=dtype, use_fast_accum=fast,
                )
            )  # fmt: skip
            form = f"{kind} {'fast' if fast else 'exact'}"
            yield {
                "product": name,
                "form": form,
                **row(f"{title} {form}", ms=ms, tflops=flops / ms),
            }


def sums(shape: Shape) -> Iterator[dict[str, Any]]:
    if shape.layer in ("out", "down"):
        for name, call in onto_stream(shape.M, shape.K, shape.N, shape.biased):
            us = microseconds(call)
            yield {"form": name, **row(f"{shape}  {name}", us=us)}


def casts(M: int, K: int, calls: Callable[[int, int], Iterator[Timed]]) -> Iterator[dict[str, Any]]:
    for name, call, size in calls(M, K):
        ms = median_ms(call)
        yield {"cast": name, **row(f"{M} x {K} {name}", ms=ms, gb_s=size / ms / 1e6)}


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def layer_of(shape: Shape, recipe: Recipe | None) -> Linear:
    layer = Linear(shape.K, shape.N)
    layer.weight = torch.nn.Parameter(torch.randn(shape.N, shape.K, device="cuda") * 0.02)
    if recipe is not None:
        layer.product = Float8Product(shape.layer, recipe)
        refresh_weights([layer])
    return layer


def layers(shape: Shape) -> Iterator[dict[str, Any]]:
    """One layer, eager, with its weight cast before."""
    x = torch.randn(shape.M, shape.K, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(shape.M, shape.N, device="cuda").bfloat16()
    flops = 2 * shape.M * shape.N * shape.K / 1e9
    for form, recipe in FORMS.items():
        torch.manual_seed(0)
        layer = layer_of(shape, recipe)
        leaves = [x, layer.weight]
        y = layer(x)
        dx, dw = torch.autograd.grad(y, leaves, grad)
        rounded = layer.weight.detach().bfloat16().float()
        errors = {
            "error Y": relative(y.detach(), x.detach().float() @ rounded.t()),
            "error dX": relative(dx, grad.float() @ rounded),
            "error dW": relative(dw, grad.float().t() @ x.detach().float()),
        }
        del y, dx, dw

        def both(layer: Linear = layer, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(layer(x), leaves, grad)

        def forward(layer: Linear = layer) -> None:
            layer(x)

        first, ms = median_ms(forward), median_ms(both)
        figures = {"forward ms": first, "backward ms": ms - first, "tflops": 3 * flops / ms}
        if recipe is not None:

            def cast(layer: Linear = layer) -> None:
                layer.product.version = -1  # type: ignore[attr-defined]
                refresh_weights([layer])

            figures["weight ms"] = median_ms(cast)
        yield {"form": form, **row(f"{shape}  {form}", **figures, **errors)}


def blocks(model: str) -> Iterator[dict[str, Any]]:
    """One block, compiled, weights cast before; memory beside weights, input and gradients."""
    batch, length = TOKENS[model]
    config = config_of(model)
    x = torch.randn(batch, length, config.model.d_model, device="cuda").bfloat16()
    x.requires_grad_()
    grad = torch.randn_like(x)
    for form, recipe in BLOCK_FORMS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        gpt = dense(model)
        if recipe is not None:
            kind = LinearKind.fp8_rowwise if recipe.rowwise else LinearKind.fp8_tensorwise
            use_float8(gpt, PrecisionConfig(linear=kind), backend=recipe.backend)
        block = gpt.blocks[0].to_empty(device="cuda")
        for name, parameter in block.named_parameters():
            with torch.no_grad():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
        if recipe is not None:
            refresh_weights(m for m in block.modules() if isinstance(m, Linear))
        position = gpt.position(length, x.device) if not gpt.position_on_embedding else None
        leaves = [x, *block.parameters()]
        block.compile(dynamic=False)

        def both(block: torch.nn.Module = block, leaves: list[Tensor] = leaves,
                 position: Tensor | None = position) -> None:  # fmt: skip
            torch.autograd.grad(block(x, position), leaves, grad)

        began = time.perf_counter()
        both()
        torch.cuda.synchronize()
        compiled = time.perf_counter() - began
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        peak = (torch.cuda.max_memory_allocated() - held) / 1e9
        ms = median_ms(both)
        figures = {"ms": ms, "compile s": round(compiled, 1), "peak GB": round(peak, 2)}
        yield {"form": form, **row(f"{model} block, {form}", **figures)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=list(TOKENS),
        default=list(TOKENS),
        help="whose layers (default: all)",
    )
    add("--parts", nargs="+", choices=PARTS, default=PARTS[:4], help="default: all but blocks")
    add("--sweep", action="store_true", help="time tiles of the cast kernels, nothing else")
    add("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("bench_fp8: needs a CUDA GPU of compute capability 8.9 or more", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    began = time.perf_counter()
    about = where()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows: list[dict[str, Any]] = []

    def gather(part: str, found: Iterator[dict[str, Any]], **keys: Any) -> None:
        rows.extend({"part": part, **keys, **figures} for figures in found)
        torch.cuda.empty_cache()

    every = list(shapes(args.models))
    # the residual stream and the widest hidden layer of each model
    inputs = [[(s.M, s.K) for s in every if s.model == model] for model in args.models]
    widths = sorted({size for sizes in inputs for size in (min(sizes), max(sizes))})
    for M, K in widths if args.sweep else []:
        gather("sweep", casts(M, K, tiles), M=M, K=K)
    for part in () if args.sweep else args.parts:
        if part == "casts":
            for M, K in widths:
                gather(part, casts(M, K, shipped), M=M, K=K)
        elif part == "blocks":
            for model in args.models:
                gather(part, blocks(model), model=model)
        else:
            for shape in every:
                call = {"products": products, "sums": sums, "layers": layers}[part]
                gather(part, call(shape), **vars(shape))
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
