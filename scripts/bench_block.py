"""The parts of a step outside attention, each beside what it stands in place of, in the same run.

    python scripts/bench_block.py                           # all parts at three sizes
    python scripts/bench_block.py --only passes --sweep     # other tiles
    python scripts/bench_block.py --only products --ways 8  # all that cuBLASLt ranks

    passes     norms forward, backward, and backward with the norm once more; GELU's derivative with
               the sum over tokens, and with GELU once more; sums over tokens; casts of weights
    rotations  of q and k by their positions; torch.compile's are joined to v in another tensor
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
import json
import sys
from collections.abc import Callable, Iterator
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
from kernels.linear import kernel as passes_kernel
from kernels.linear import norm_gelu_mlp, products, reference
from kernels.norm import kernel as norm
from kernels.norm.reference import add_norm_reference
from kernels.rope import kernel as rope
from kernels.rope import rotate, rotate_heads
from scripts.parts.block_sizes import EPS, SIZES, Size, heads_of, randn
from scripts.parts.block_tiles import sweep, sweep_rotation, ways
from scripts.parts.graph_timing import copy_rate, microseconds, on_the_side, product_rate
from scripts.parts.where import where

VOCABULARY = 50304
Row = dict[str, Any]


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


def rotations(size: Size) -> Iterator[Row]:
    qkv, table, turning = heads_of(size)

    def joined(x: Tensor) -> Tensor:
        return torch.cat((rotate(x[:, :, :turning], table), x[:, :, turning:]), dim=2)

    peer = compiled(joined)
    moved = 2 * qkv[:, :, :turning].numel()
    run = partial(rope.rotate, qkv, qkv, table, turning, False)
    yield row("rotation in place", size, run, partial(peer, qkv), numbers=moved)
    run = partial(rotate_heads, qkv, table, turning)
    yield row("rotation, new tensor", size, run, partial(peer, qkv), numbers=2 * qkv.numel())
    theirs = backward_of(compiled(joined), [qkv], torch.randn_like(qkv))
    run = partial(rope.rotate, qkv, qkv, table, turning, True)
    yield row("rotation backward", size, run, theirs, numbers=moved)


def swiglu(d: Tensor, z: Tensor, again: bool) -> tuple[Tensor, ...]:
    """SwiGLU's backward, and SwiGLU once more."""
    dz = reference.swiglu_gradient(d, z)
    return (dz, reference.swiglu(z)) if again else (dz,)


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


PARTS = {
    "passes": passes,
    "rotations": rotations,
    "products": product_rows,
    "halves": halves,
    "ends": ends,
}


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
            if part == "rotations" and options.sweep:
                sweep_rotation(size)
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
