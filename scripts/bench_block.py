"""The parts of a block outside attention, each beside torch.compile's version in the same run.

    python scripts/bench_block.py                     # norms, products, MLP, joined attention
    python scripts/bench_block.py --only norms --sweep
    python scripts/bench_block.py --only mlp --ways 8  # each way that cuBLASLt ranks
    python scripts/bench_block.py --steps 12          # whole steps, with all and without each

Sizes are those of gpt2_124m (32 x 1024 tokens), gpt2_350m (16 x 1024) and gpt_1.3b (8 x 2048), in
bf16 with fp32 weights. Times are medians of CUDA graphs, so no launch counts. `of copy` and `of
product` are shares of a large copy's and a large product's rate, measured first. Ours stays where
it is the faster one (kernels/README.md).
"""

import argparse
import contextlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
import triton
from torch import Tensor
from torch.nn import functional as F

import flashtrain.model.linear as model_linear
import flashtrain.model.mlp as model_mlp
import flashtrain.model.norm as model_norm
from flashtrain.model.attention import Attention
from kernels.attention import attention, attention_packed
from kernels.linear import cublaslt, gelu_mlp
from kernels.linear import op as products
from kernels.norm import kernel as norm
from kernels.norm.reference import add_norm_reference
from kernels.norm.tiles import Tile, backward_tile, forward_tile
from scripts import bench_train
from scripts.graph_timing import copy_rate, microseconds, product_rate

# tokens, width, heads, sequence, biases
MODELS = {
    "124m": (32768, 768, 12, 1024, True),
    "350m": (16384, 1024, 16, 1024, True),
    "1.3b": (16384, 2048, 16, 2048, False),
}
SHAPES, PROGRAMS, STAGES = ((1, 2), (1, 4), (2, 4), (4, 4), (1, 8), (2, 8)), (2, 3, 4, 6, 8), (1, 3)
Row = dict[str, Any]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def backward_of(function: Callable[..., Any], inputs: list[Tensor], *seeds: Tensor) -> Any:
    """A call that runs its backward again and again."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def norms(model: str, sweep: bool) -> list[Row]:
    """x + branch -> norm and stream; backward with a gradient along the stream."""
    N, D, _, _, has_bias = MODELS[model]
    x, branch, dy, ds = (randn(N, D) for _ in range(4))
    weight = randn(D, dtype=torch.float32)
    bias = randn(D, dtype=torch.float32) if has_bias else None
    size = 2 * N * D
    _, stream, mean, rstd = norm.forward(x, branch, weight, bias, 1e-5, True)

    def reference(x: Tensor, branch: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm_reference(x, branch, parameters[0], (*parameters, None)[1], 1e-5, True)

    parameters = [weight] if bias is None else [weight, bias]
    peer = compiled(reference)
    with torch.no_grad():
        theirs = microseconds(lambda: peer(x, branch, *parameters))
    ours = microseconds(lambda: norm.forward(x, branch, weight, bias, 1e-5, True))
    rows = [row("norm forward", model, ours, theirs, bytes=4 * size)]
    again = backward_of(compiled(reference), [x, branch, *parameters], dy, ds)
    ours = microseconds(lambda: norm.backward(dy, ds, stream, weight, mean, rstd, has_bias, True))
    rows.append(row("norm backward", model, ours, microseconds(again), bytes=4 * size))
    if not sweep:
        return rows
    best: list[tuple[float, str, Tile]] = []
    for r, w in SHAPES:
        tile = Tile(r, w)
        took = microseconds(partial(norm.forward, x, branch, weight, bias, 1e-5, True, tile))
        best.append((took, "forward", tile))
    for (r, w), p, s in itertools.product(SHAPES, PROGRAMS, STAGES):
        tile = Tile(r, w, p, s)
        given = (dy, ds, stream, weight, mean, rstd, has_bias, True, tile)
        took = microseconds(partial(norm.backward, *given))
        best.append((took, "backward", tile))
    shipped = {"forward": forward_tile(D, x.device), "backward": backward_tile(D, x.device)}
    for kind, mine in shipped.items():
        found = sorted((b for b in best if b[1] == kind), key=lambda b: b[0])
        for took, _, tile in found[:5]:
            print(f"  {model} {kind}: {took:.1f} us {tile}" + " shipped" * (tile == mine))
    return rows


def mlp(model: str, ways: int) -> list[Row]:
    """The three products with epilogues, and the whole MLP, forward and backward."""
    N, D, _, _, has_bias = MODELS[model]
    H = 4 * D
    x, dy, up, down = randn(N, D), randn(N, D), randn(H, D), randn(D, H)
    up.mul_(D**-0.5), down.mul_(H**-0.5)
    bias = randn(H) if has_bias else None
    z, a = products._gelu_forward(x, up, bias, "auto")
    flops = 2.0 * N * D * H

    def forward(x: Tensor, up: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        z = F.linear(x, up, bias)
        return z, F.gelu(z, approximate="tanh")

    def backward(dy: Tensor, down: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        dz = torch.ops.aten.gelu_backward(dy @ down, z, approximate="tanh")
        return dz, dz.sum(0).float() if has_bias else None

    def gradient(dy: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        return (dy.t() @ a).float(), dy.sum(0).float() if has_bias else None

    rows = []
    for name, reference, function, given, kind in (
        ("up + GELU", forward, products._gelu_forward, (x, up, bias), ()),
        ("down dx + GELU'", backward, products._gelu_backward, (dy, down, z), (has_bias,)),
        ("down dW", gradient, products._weight_gradient, (dy, a), (torch.float32, has_bias)),
    ):
        peer = compiled(reference)
        with torch.no_grad():
            theirs = microseconds(lambda: peer(*given))  # noqa: B023
            ours = microseconds(lambda: function(*given, *kind, "auto"))  # noqa: B023
        rows.append(row(name, model, ours, theirs, flops=flops))
    bare = microseconds(lambda: F.linear(x, up, bias))
    rows.append(row("up alone", model, bare, bare, flops=flops))
    parameters = [up.float(), down.float()]
    biases = [randn(H, dtype=torch.float32), randn(D, dtype=torch.float32)] * has_bias

    def plain(x: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        first, second = biases or (None, None)
        cast = [None if b is None else b.to(x.dtype) for b in (first, second)]
        middle = F.gelu(F.linear(x, up.to(x.dtype), cast[0]), approximate="tanh")
        return F.linear(middle, down.to(x.dtype), cast[1])

    def fused(x: Tensor, up: Tensor, down: Tensor, *biases: Tensor, keeps: bool = True) -> Tensor:
        first, second = biases or (None, None)
        return gelu_mlp(x, up, first, down, second, keeps=keeps)

    def whole(function: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = [p.detach().requires_grad_() for p in (x, *parameters, *biases)]
        run = compiled(function)
        return lambda: torch.autograd.grad(run(*leaves), leaves, dy)

    forms = (fused, partial(fused, keeps=False), plain)
    kept, again, theirs = (microseconds(whole(form), calls=3) for form in forms)
    rows.append(row("MLP, both passes", model, kept, theirs, flops=6 * flops))
    rows.append(row("MLP, GELU made again", model, again, theirs, flops=6 * flops))
    if ways:
        show_ways(model, ways, x, up, bias, z, a, dy, down)
    return rows


def show_ways(
    model: str, ways: int, x: Tensor, up: Tensor, bias: Tensor | None, z: Tensor, a: Tensor,
    dy: Tensor, down: Tensor,
) -> None:  # fmt: skip
    """Times of what cuBLASLt ranks after its first choice."""
    E, row_major = cublaslt.Epilogue, cublaslt.row_major
    has_bias = bias is not None
    dz, total = torch.empty_like(z), torch.empty(z.shape[1], device="cuda", dtype=z.dtype)
    dw = torch.empty(dy.shape[1], a.shape[1], device="cuda")
    sums = torch.empty(dy.shape[1], device="cuda")
    cases = {
        "up + GELU": (
            (row_major(up, True), row_major(x), row_major(a)),
            E.gelu_aux_bias if has_bias else E.gelu_aux, (up, x, a, z, bias),
        ),
        "down dx + GELU'": (
            (row_major(down), row_major(dy), row_major(dz)),
            E.dgelu_bgrad if has_bias else E.dgelu, (down, dy, dz, z, total if has_bias else None),
        ),
        "down dW": (
            (row_major(a), row_major(dy, True), row_major(dw)),
            E.bgradb if has_bias else E.none, (a, dy, dw, None, sums if has_bias else None),
        ),
    }  # fmt: skip
    for name, (matrices, epilogue, tensors) in cases.items():
        times = []
        for choice in range(ways):
            try:
                plan = cublaslt.Plan(*matrices, epilogue, 256, choice)
            except cublaslt.UnsupportedError:
                break
            times.append(microseconds(lambda: plan.run(*tensors)))  # noqa: B023
        print(f"  {model} {name}: ways " + ", ".join(f"{t:.1f}" for t in times) + " us")


def joined(model: str) -> list[Row]:
    """Attention of one tensor of q, k and v, both passes, beside three and their join."""
    N, D, heads, T, _ = MODELS[model]
    qkv = randn(N // T, T, 3 * heads, D // heads)
    seed = randn(N // T, T, heads, D // heads)

    def apart(qkv: Tensor) -> Tensor:
        return attention(*qkv.split([heads] * 3, dim=2), causal=True)

    def packed(qkv: Tensor) -> Tensor:
        return attention_packed(qkv, heads, causal=True)

    took = [microseconds(backward_of(compiled(f), [qkv], seed)) for f in (packed, apart)]
    return [row("attention backward", model, *took, flops=2.5 * 2.0 * N * T * D)]


def without(name: str) -> contextlib.ExitStack:
    """In here the model computes one of its parts as torch.compile does."""
    stack = contextlib.ExitStack()

    def put(owner: object, attribute: str, other: object) -> None:
        stack.enter_context(mock.patch.object(owner, attribute, other))

    def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def composed(x: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any) -> Tensor:
        middle = F.gelu(model_linear.linear(x, up, up_bias), approximate="tanh")
        return model_linear.linear(middle, down, down_bias)

    if name == "norms":
        put(model_norm, "add_norm", partial(model_norm.add_norm, backend="torch"))
    if name in ("products", "all"):
        put(model_linear, "linear", plain_linear)
    if name in ("gelu", "all"):
        put(model_mlp, "gelu_mlp", composed)
    if name in ("packed", "all"):
        put(Attention, "_stays_packed", lambda *_: False)
    if name == "all":
        put(model_norm, "add_norm", partial(model_norm.add_norm, backend="torch"))
    return stack


def whole_steps(model: str, steps: int) -> None:
    """ms and GB of a step: with everything, without each part, and launched kernel by kernel."""
    case = dict(zip(MODELS, bench_train.ONE_GPU, strict=True))[model]
    device = torch.device("cuda", 0)
    for name in ("", "norms", "products", "gelu", "packed", "graph", "all", ""):
        change = " trainer.cuda_graph=off" if name in ("graph", "all") else ""
        with without(name):
            found = bench_train.measure(case + change, steps, 5, device)
        keys = ("ms/step", "peak GB", "reserved GB", "loss", "start s")
        told = "  ".join(f"{key} {found[key]}" for key in keys)
        print(f"{model} {'without ' + name if name else 'with everything':<20} {told}", flush=True)


def row(
    part: str, model: str, ours: float, theirs: float, *, bytes: float = 0, flops: float = 0
) -> Row:
    found: Row = {"part": part, "model": model, "us": ours, "compile us": theirs}
    if bytes:
        found["GB/s"] = bytes / ours / 1e3
    if flops:
        found["TFLOP/s"] = flops / ours / 1e6
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("norms", "mlp", "attention"), help="one kind of part")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all"
    )
    parser.add_argument("--sweep", action="store_true", help="time other tiles of the norms")
    parser.add_argument("--steps", type=int, default=0, help="time so many whole steps instead")
    parser.add_argument("--ways", type=int, default=0, help="so many of cuBLASLt's ways")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_block: needs a CUDA GPU, none is visible", file=sys.stderr)
        return 2
    if options.steps:
        for model in options.models:
            whole_steps(model, options.steps)
        return 0
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # backwards run more than once
    copies, whole = copy_rate(), product_rate()
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "copy GB/s": round(copies),
        "product TFLOP/s": round(whole),
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"{'part':<22}{'model':>7}{'us':>9}{'compile':>9}{'ratio':>7}{'rate':>15}{'of limit':>9}")
    rows: list[Row] = []
    for model in options.models:
        found: list[Row] = []
        if options.only in (None, "norms"):
            found += norms(model, options.sweep)
        if options.only in (None, "mlp"):
            found += mlp(model, options.ways)
        if options.only in (None, "attention"):
            found += joined(model)
        for one in found:
            unit = "GB/s" if "GB/s" in one else "TFLOP/s"
            share = one[unit] / (copies if unit == "GB/s" else whole)
            print(
                f"{one['part']:<22}{model:>7}{one['us']:>9.1f}{one['compile us']:>9.1f}"
                f"{one['compile us'] / one['us']:>7.2f}{one[unit]:>7.0f} {unit:<7}{share:>9.0%}",
                flush=True,
            )
        rows += found
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
