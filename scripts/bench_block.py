"""The parts of a step outside attention, each beside what it stands in place of, in the same run.

    python scripts/bench_block.py                           # all parts at three sizes
    python scripts/bench_block.py --only passes --sweep     # other tiles
    python scripts/bench_block.py --only products --ways 8  # all that cuBLASLt ranks

    passes     norms forward, backward, and backward with the norm once more; GELU's derivative with
               the sum over tokens, and with GELU once more; sums over tokens; casts of weights
    products   of every layer: y, with GELU, added to the stream, dx, and dW as it is shipped, in
               bf16 and cast, and in fp32
    halves     norm and MLP, forward and backward together
    ends       the embedding's rows and their gradient; AdamW's step on the largest matrix

Sizes are those of gpt2_124m (32 x 1024 tokens), gpt2_350m (16 x 1024) and gpt_1.3b (8 x 2048), in
bf16 with fp32 weights. The other side is torch.compile's version of the plain operations, or
PyTorch's own kernel where that is one. Times are medians of CUDA graphs, so no launch counts. `of
limit`: share of a large pass's or a large product's rate, measured first. Ours stays where it is
the faster one (kernels/README.md). Whole steps without each: scripts/bench_without.py.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

from kernels.adamw import adamw_
from kernels.embedding import kernel as table
from kernels.linear import cublaslt, norm_gelu_mlp, products, reference
from kernels.linear import kernel as passes_kernel
from kernels.linear.tiles import pass_tile
from kernels.norm import kernel as norm
from kernels.norm.reference import add_norm_reference
from kernels.norm.tiles import backward_tile, forward_tile
from scripts.parts.graph_timing import copy_rate, microseconds, on_the_side, product_rate
from scripts.parts.where import where

VOCABULARY, EPS = 50304, 1e-5


@dataclass(frozen=True)
class Size:
    name: str
    N: int  # tokens
    D: int  # width
    biases: bool


SIZES = (
    Size("124m", 32768, 768, True),
    Size("350m", 16384, 1024, True),
    Size("1.3b", 16384, 2048, False),
)
Row = dict[str, Any]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def backward_of(function: Callable[..., Any], inputs: list[Tensor], *seeds: Tensor) -> Any:
    """A call that runs its backward again and again."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with on_the_side():
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def row(
    part: str, size: Size, ours: Callable[[], object], theirs: Callable[[], object] | None = None,
    *, numbers: float = 0, bytes: float = 0, flops: float = 0,
) -> Row:  # fmt: skip
    """numbers: in bf16 that are read and written at least; bytes: of others."""
    found: Row = {"part": part, "model": size.name, "us": microseconds(ours)}
    if theirs is not None:
        with torch.no_grad():
            found["other us"] = microseconds(theirs)
    moved = bytes + 2 * numbers
    if moved:
        found["GB/s"] = moved / found["us"] / 1e3
    if flops:
        found["TFLOP/s"] = flops / found["us"] / 1e6
    return found


def passes(size: Size) -> Iterator[Row]:
    N, D, H = size.N, size.D, 4 * size.D
    x, dy, ds = (randn(N, D) for _ in range(3))
    weight = randn(D, dtype=torch.float32)
    bias = randn(D, dtype=torch.float32) if size.biases else None
    _, _, mean, rstd = norm.forward(x, None, weight, bias, EPS, True)

    def reference(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        y, s = add_norm_reference(x, None, given[0], (*given, None)[1], EPS, True)
        return y, s.clone() if torch.is_grad_enabled() else s

    given = [weight] if bias is None else [weight, bias]
    peer = compiled(reference)
    yield row("norm forward", size, lambda: norm.forward(x, None, weight, bias, EPS, True),
              lambda: peer(x, *given), numbers=2 * N * D)  # fmt: skip
    again = backward_of(compiled(reference), [x, *given], dy, ds)
    for name, wants in (("norm backward", False), ("norm backward, norm again", True)):
        sums = wants and size.biases
        run = partial(norm.backward, dy, ds, x, weight, bias, mean, rstd, True, wants, sums)
        yield row(name, size, run, again, numbers=(4 + wants) * N * D)
    d, z = randn(N, H), randn(N, H)

    def gelu(d: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        dz = torch.ops.aten.gelu_backward(d, z, approximate="tanh")
        return (dz, dz.sum(0).float()) if size.biases else (dz,)

    def gelu_again(d: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return *gelu(d, z), F.gelu(z, approximate="tanh")

    for name, wants, other in (
        ("GELU'", False, gelu), ("GELU', GELU again", True, gelu_again),
    ):  # fmt: skip
        run = partial(passes_kernel.gelu_backward, d, z, size.biases, wants)
        theirs = partial(compiled(other), d, z)
        yield row(name, size, run, theirs, numbers=(3 + wants) * N * H)
    d, z = randn(N, 11 * D // 4), randn(N, 11 * D // 2)  # as wide as Llama's MLPs: 8/3 and more
    for name, wants in (("SwiGLU'", False), ("SwiGLU', SwiGLU again", True)):
        run = partial(passes_kernel.swiglu_backward, d, z, False, wants)
        theirs = partial(compiled(partial(swiglu, again=wants)), d, z)
        yield row(name, size, run, theirs, numbers=(5 + wants) * d.numel())
    wide = randn(N, 3 * D)
    theirs = partial(compiled(lambda x: x.sum(0, dtype=torch.float32)), wide)
    run = partial(passes_kernel.column_sums, wide, torch.float32)
    yield row("sums over tokens", size, run, theirs, numbers=wide.numel())
    up, up_bias = randn(H, D, dtype=torch.float32), randn(H, dtype=torch.float32)
    cast = compiled(lambda w, b: (w.bfloat16(), b.bfloat16()))
    run = partial(passes_kernel.cast, up, up_bias, torch.bfloat16)
    yield row("cast of up", size, run, lambda: cast(up, up_bias), numbers=3 * up.numel())


def swiglu(d: Tensor, z: Tensor, again: bool) -> tuple[Tensor, ...]:
    """SwiGLU's backward, and SwiGLU once more."""
    dz = reference.swiglu_gradient(d, z)
    return (dz, reference.swiglu(z)) if again else (dz,)


def sweep(size: Size) -> None:
    """Other tiles of the passes, best first."""
    N, D, H = size.N, size.D, 4 * size.D
    x, dy, ds, d, z, wide = (randn(N, n) for n in (D, D, D, H, H, 3 * D))
    weight, bias = randn(D, dtype=torch.float32), randn(D, dtype=torch.float32)
    _, _, mean, rstd = norm.forward(x, None, weight, bias, EPS, True)
    shapes = ((1, 2), (1, 4), (2, 4), (4, 4), (1, 8), (2, 8))
    device, own = x.device, pass_tile(x.device)
    first, second = forward_tile(D, device), backward_tile(D, device, True)
    walks = [
        replace(second, rows=r, warps=w, programs=p, stages=s)
        for (r, w), p, s in itertools.product(shapes, (2, 3, 4, 6, 8), (1, 3))
    ]
    blocks = [
        replace(own, rows=r, columns=c, warps=w, programs=p, stages=s)
        for (r, c, w), p, s in itertools.product(
            ((8, 256, 4), (4, 256, 4), (4, 512, 4), (8, 512, 8), (16, 256, 8)),
            (4, 6, 8, 12),
            (1, 3),
        )
    ]
    gated, half, double = pass_tile(x.device, gated=True), randn(N, 2 * D), randn(N, H)
    kinds: dict[str, tuple[Any, list[Any], Any]] = {
        "norm forward": (partial(norm.forward, x, None, weight, bias, EPS, True),
                         [replace(first, rows=r, warps=w) for r, w in shapes], first),
        "norm again": (partial(norm.backward, dy, ds, x, weight, bias, mean, rstd, True, True,
                               True),
                       walks, second),
        "GELU'": (partial(passes_kernel.gelu_backward, d, z, True, False), blocks, own),
        "GELU again": (partial(passes_kernel.gelu_backward, d, z, True, True), blocks, own),
        "SwiGLU'": (partial(passes_kernel.swiglu_backward, half, double, False, False), blocks,
                    gated),
        "sums": (partial(passes_kernel.column_sums, wide, torch.float32), blocks, own),
    }  # fmt: skip
    for kind, (call, tiles, mine) in kinds.items():
        found = sorted((microseconds(partial(call, tile)), str(tile)) for tile in {*tiles, mine})
        told = [one for one in found if one in found[:4] or one[1] == str(mine)]
        for took, tile in told:
            mark = "  <- shipped" if tile == str(mine) else ""
            print(f"  {size.name} {kind}: {took:.1f} us {tile}{mark}", flush=True)


def product_rows(size: Size) -> Iterator[Row]:
    """Of every layer."""
    N, D, H = size.N, size.D, 4 * size.D
    for name, K, E in (("qkv", D, 3 * D), ("out", D, D), ("up", D, H), ("down", H, D)):
        x, dy, weight, stream = randn(N, K), randn(N, E), randn(E, K), randn(N, E)
        bias = randn(E) if size.biases else None
        flops = 2.0 * N * K * E
        plain = partial(F.linear, x, weight, bias)
        if name == "up":
            gelu = compiled(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"))
            run = partial(products.gelu_product, x, weight, bias, "cublaslt")
            yield row("up + GELU", size, run, partial(gelu, x, weight, bias), flops=flops)
        if name in ("out", "down"):
            add = compiled(lambda x, w, b, s: s + F.linear(x, w, b))
            run = partial(products.add_product, x, weight, bias, stream, "cublaslt")
            yield row(f"{name} + stream", size, run, partial(add, x, weight, bias, stream),
                      flops=flops)  # fmt: skip
        yield row(f"{name} y", size, plain, flops=flops)
        yield row(f"{name} dx", size, partial(torch.mm, dy, weight), flops=flops)
        small = compiled(lambda dy, x: (dy.t() @ x).float())
        run = partial(products.weight_gradient, dy, x, torch.float32, "cublaslt")
        yield row(f"{name} dW", size, run, partial(small, dy, x), flops=flops)
        wide = partial(torch.mm, dy.t(), x, out_dtype=torch.float32)
        yield row(f"{name} dW, fp32 product", size, wide, flops=flops)


def ways(size: Size, count: int) -> None:
    """Times of what cuBLASLt ranks, with the workspace that is shipped and a larger one."""
    N, D, H = size.N, size.D, 4 * size.D
    E, major = cublaslt.Epilogue, cublaslt.row_major
    bias, tall = (randn(n) if size.biases else None for n in (D, H))
    x, dy, stream = (randn(N, D) for _ in range(3))
    a, z, up, down = randn(N, H), randn(N, H), randn(H, D), randn(D, H)
    dz, y, dw, narrow = (
        torch.empty_like(a),
        torch.empty_like(x),
        *(torch.empty(n, D, device="cuda") for n in (H, D)),
    )
    square = randn(D, D)
    plain, with_gelu = (E.bias, E.gelu_aux_bias) if size.biases else (E.none, E.gelu_aux)
    cases: dict[str, tuple[Any, ...]] = {
        "up + GELU": ((major(up, True), major(x), major(a)), with_gelu, (up, x, a),
                      {"aux": z, "bias": tall}),
        "down + stream": ((major(down, True), major(a), major(y)), plain, (down, a, y),
                          {"c": stream, "bias": bias}),
        "out + stream": ((major(square, True), major(x), major(y)), plain, (square, x, y),
                         {"c": stream, "bias": bias}),
        "up dW": ((major(x), major(a, True), major(dw)), E.none, (x, a, dw), {}),
        "out dW": ((major(x), major(dy, True), major(narrow)), E.none, (x, dy, narrow), {}),
        # not taken: its first way ran at 183 TFLOP/s
        "down dx + GELU'": ((major(down), major(dy), major(dz)), E.dgelu, (down, dy, dz),
                            {"aux": z}),
    }  # fmt: skip
    shipped = cublaslt.WORKSPACE
    for name, (matrices, epilogue, tensors, options) in cases.items():
        for workspace in (shipped, 4 * shipped):
            cublaslt.WORKSPACE, times = workspace, []
            for choice in range(count):
                try:
                    plan = cublaslt.Plan(*matrices, epilogue, 256, choice)
                except cublaslt.UnsupportedError:
                    break
                times.append(microseconds(partial(plan.run, *tensors, **options)))
            told = ", ".join(f"{took:.1f}" for took in times)
            print(f"  {size.name} {name}, {workspace >> 20} MiB: ways {told} us", flush=True)
    cublaslt.WORKSPACE = shipped


def halves(size: Size) -> Iterator[Row]:
    N, D, H = size.N, size.D, 4 * size.D
    x, seed, ones = randn(N, D), randn(N, D), torch.ones(D, device="cuda")
    matrices = [randn(H, D, dtype=torch.float32), randn(D, H, dtype=torch.float32)]
    vectors = [randn(n, dtype=torch.float32) if size.biases else None for n in (D, H, D)]
    given = [x, ones, vectors[0], matrices[0], vectors[1], matrices[1], vectors[2]]
    leaves = [None if t is None else t.requires_grad_() for t in given]

    def plain(x: Tensor, w: Tensor, b: Any, up: Tensor, ub: Any, down: Tensor, db: Any) -> Tensor:
        y = add_norm_reference(x, None, w, b, EPS, True)[0]
        ub, db = (None if v is None else v.to(x.dtype) for v in (ub, db))
        middle = F.gelu(F.linear(y, up.to(x.dtype), ub), approximate="tanh")
        return x + F.linear(middle, down.to(x.dtype), db)

    def both(function: Callable[..., Tensor]) -> Callable[[], object]:
        run = compiled(function)
        wanted = [leaf for leaf in leaves if leaf is not None]

        def call() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(run(*leaves), wanted, seed)

        return call

    theirs = both(plain)
    for name, remakes in (("norm + MLP", False), ("norm + MLP, light", True)):
        ours = partial(norm_gelu_mlp, eps=EPS, centers=True, remakes=remakes)
        yield row(name, size, both(ours), theirs, flops=12.0 * N * D * H)


def ends(size: Size) -> Iterator[Row]:
    N, D = size.N, size.D
    often = 1 / torch.arange(1, VOCABULARY + 1).double()  # Zipf's law
    tokens = torch.multinomial(often, N, replacement=True).to("cuda")
    weight, dy = randn(VOCABULARY, D, dtype=torch.float32), randn(N, D)
    run = partial(table.gather, tokens, weight, torch.bfloat16)
    yield row("embedding", size, run, lambda: F.embedding(tokens, weight).bfloat16(),
              bytes=6 * N * D)  # fmt: skip
    theirs = backward_of(lambda w: F.embedding(tokens, w).bfloat16(), [weight], dy)
    run = partial(table.gradient, tokens, dy, VOCABULARY, torch.float32)
    yield row("embedding backward", size, run, theirs, bytes=2 * N * D + 4 * VOCABULARY * D)
    p, g, m, v = (torch.rand(VOCABULARY, D, device="cuda") for _ in range(4))
    step, lr, one, zero = (torch.tensor(n, device="cuda") for n in (5.0, 1e-4, 1.0, 0.0))
    options = {"lr": lr, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    run = partial(adamw_, p, g, m, v, step, skip=zero, scale=one, **options)
    theirs = partial(torch._fused_adamw_, [p], [g], [m], [v], [], [step], amsgrad=False,
                     maximize=False, grad_scale=one, found_inf=zero, **options)  # fmt: skip
    yield row("AdamW", size, run, theirs, bytes=28 * p.numel())


PARTS = {"passes": passes, "products": product_rows, "halves": halves, "ends": ends}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [size.name for size in SIZES]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--sweep", action="store_true", help="time other tiles of the passes")
    parser.add_argument("--ways", type=int, default=0, help="so many of cuBLASLt's ways")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_block: needs a CUDA GPU, none is visible", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # backwards run more than once
    copies, whole = copy_rate(), product_rate()
    environment = where() | {
        "pass GB/s": str(round(copies)),
        "product TFLOP/s": str(round(whole)),
    }
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"{'part':<26}{'model':>7}{'us':>9}{'other':>9}{'ratio':>7}{'rate':>15}{'of limit':>9}")
    rows: list[Row] = []
    for size in SIZES:
        for part in options.only if size.name in options.models else ():
            for one in PARTS[part](size):
                print(line(one, copies, whole), flush=True)
                rows.append(one)
            if part == "passes" and options.sweep:
                sweep(size)
            if part == "products" and options.ways:
                ways(size, options.ways)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2))
    return 0


def line(one: Row, copies: float, whole: float) -> str:
    unit = "GB/s" if "GB/s" in one else "TFLOP/s"
    other = ratio = ""
    if "other us" in one:
        other, ratio = f"{one['other us']:.1f}", f"{one['other us'] / one['us']:.2f}"
    share = one[unit] / (copies if unit == "GB/s" else whole)
    cells = f"{one['part']:<26}{one['model']:>7}{one['us']:>9.1f}{other:>9}{ratio:>7}"
    return f"{cells}{one[unit]:>7.0f} {unit:<7}{share:>9.0%}"


if __name__ == "__main__":
    sys.exit(main())
