"""Speed, memory and error of the head with its loss, beside its peers.

    python scripts/bench_linear_cross_entropy.py                    # 12 shapes, every peer found
    python scripts/bench_linear_cross_entropy.py --sweep            # ours alone: sizes of a chunk
    python scripts/bench_linear_cross_entropy.py --rows             # the row kernel alone, checked
    python scripts/bench_linear_cross_entropy.py --words 50304 --widths 2048 --tokens 16384

As in training: bf16 hidden states, fp32 master weights that are cast in the measured call, sum of
token losses, one label in 16 ignored, forward and backward together. Times are medians by CUDA
events. TFLOP/s count the three products (6 N V D), also where a peer computes more. Memory is the
peak above the inputs, and the same without the two gradients, which every form has to make. Errors
are against float64 over the first 512 tokens; `x eager` divides by eager's. The compiled form's
are not taken.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy, rows_torch, rows_triton, tiles
from kernels.linear_cross_entropy.problem import Terms
from kernels.linear_cross_entropy.tiles import Tile, chunk_tokens
from scripts.parts.where import where

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> summed loss
CHECKED = 512  # tokens whose results are compared with float64
CHUNKS = (512, 1024, 1536, 2048, 3072, 4096, 8192)
TILES = tuple(
    Tile(*each)
    for each in (
        (4096, 16, 2, 1), (4096, 16, 2, 3), (4096, 16, 3, 1), (4096, 16, 3, 3), (4096, 16, 0, 3),
        (8192, 16, 2, 1), (8192, 32, 1, 2), (2048, 8, 4, 3), (2048, 8, 6, 3),
    )
)  # fmt: skip
# rows and words: chunks of gpt2_124m (32,768 tokens), of gpt_1.3b (16,384) and of Llama's words
ROWS = ((4096, 50304), (2048, 50304), (4096, 128256))
ROWS_CHECKED = 512


@dataclass(frozen=True)
class Shape:
    words: int  # V
    width: int  # D
    tokens: int  # N

    @property
    def flops(self) -> float:
        return 6.0 * self.words * self.width * self.tokens

    @property
    def gradient_bytes(self) -> int:
        """Of hidden in bf16 and of the weight in fp32."""
        return 2 * self.tokens * self.width + 4 * self.words * self.width

    def __str__(self) -> str:
        return f"V={self.words} D={self.width} N={self.tokens}"


def inputs_of(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves hidden [N, D] bf16 and weight [V, D] fp32, logits of spread 1; labels [N]."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(shape.words, shape.width, device="cuda").mul_(shape.width**-0.5)
    labels = torch.randint(shape.words, (shape.tokens,), device="cuda")
    labels[::16] = -100
    return hidden, weight.requires_grad_(), labels


def with_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Without the fp32 copy of all logits that the compiler fuses away."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)), labels, reduction="sum")


def compiled() -> Call:
    torch._dynamo.reset()  # else the 8 recompilations of one function end at the ninth shape
    return torch.compile(with_logits, dynamic=False)


def liger() -> Call | str:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as missing:
        return f"liger_kernel is not installed: {missing}"

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # positional up to reduction: bias, ce_weight, ignore_index, lse_square_scale, smoothing
        result = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight.to(hidden.dtype), labels, None, None, -100, 0.0, 0.0, "sum"
        )
        return result[0] if isinstance(result, tuple) else result

    return call


def ours(chunk: int | None = None) -> Call:
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, chunk=chunk)


PEERS: dict[str, Callable[[], Call | str]] = {
    "eager": lambda: eager,
    "compiled": compiled,
    "liger": liger,
    "ours": ours,
}


def step(call: Call, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    call(*inputs).backward()


def measure(call: Call, shape: Shape, repeats: int) -> dict[str, float]:
    """Milliseconds, TFLOP/s and peak bytes of a step."""
    inputs = inputs_of(shape)
    step(call, inputs)  # compiles, and libraries take their workspaces
    inputs[0].grad = inputs[1].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(call, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    ms = median_ms(lambda: step(call, inputs), repeats)
    return {
        "ms": ms,
        "tflops": shape.flops / ms / 1e9,
        "peak_bytes": peak,
        "beside_gradients_bytes": peak - shape.gradient_bytes,
    }


def median_ms(function: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    values = sorted(start.elapsed_time(end) for start, end in times)
    return values[len(values) // 2]


def results(call: Call, shape: Shape, *, exact: bool = False) -> list[Tensor]:
    """Loss, d_hidden and d_weight over the first tokens, of which ours makes several chunks.

    exact: in float64, from the bf16 weights that every form multiplies with.
    """
    hidden, weight, labels = inputs_of(shape)
    leaves = [hidden.detach()[:CHECKED], weight.detach()]
    if exact:
        leaves = [leaves[0].double(), leaves[1].bfloat16().double()]
    del weight
    loss = call(*(x.requires_grad_() for x in leaves), labels[:CHECKED])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative, in the 2-norm."""
    named = zip(("loss", "d_hidden", "d_weight"), found, exact, strict=True)
    return {f"error_{n}": ((x - y).norm() / y.norm()).item() for n, x, y in named}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every peer at every shape; prints a row each."""
    rows: list[dict[str, Any]] = []
    refused = set()
    print(f"{'shape':26} {'form':9} {'ms':>8} {'TFLOP/s':>8} {'peak GB':>8} {'beside dH, dW':>13}"
          f"  {'dH err':>8} {'dW err':>8} {'x eager':>8}")  # fmt: skip
    for shape in shapes(args):
        exact = None if args.no_errors else results(eager, shape, exact=True)
        base: dict[str, float] = {}
        for name in args.forms:
            try:
                call = PEERS[name]()
                if isinstance(call, str):
                    raise ImportError(call)
                row = measure(call, shape, args.repeats)
                if exact is not None and name != "compiled":  # it would compile once more
                    checked = ours(CHECKED // 4) if name == "ours" else call
                    row |= errors(results(checked, shape), exact)
            except Exception as failure:  # a peer may refuse or run out of memory
                sentence = str(failure).splitlines()[0] if str(failure) else repr(failure)
                if (name, sentence) not in refused:
                    print(f"{shape!s:26} {name:9} {sentence}")
                refused.add((name, sentence))
                torch.cuda.empty_cache()
                continue
            if name == "eager":
                base = row
            gradients = ("error_d_hidden", "error_d_weight")
            if base and gradients[0] in row:
                row["error_over_eager"] = max(row[n] / base[n] for n in gradients)
            print(
                f"{shape!s:26} {name:9} {row['ms']:8.3f} {row['tflops']:8.0f}"
                f" {row['peak_bytes'] / 1e9:8.3f} {row['beside_gradients_bytes'] / 1e9:13.3f}"
                f"  {row.get(gradients[0], 0.0):8.1e} {row.get(gradients[1], 0.0):8.1e}"
                f" {row.get('error_over_eager', 0.0):8.2f}",
                flush=True,
            )
            rows.append({**asdict(shape), "form": name, **row})
        del exact
        torch.cuda.empty_cache()
    return rows


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours over chunk sizes, at every shape."""
    rows: list[dict[str, Any]] = []
    for shape in shapes(args):
        default = chunk_tokens(shape.tokens)
        for chunk in sorted({*CHUNKS, default}):
            if chunk > shape.tokens:
                continue
            row = measure(ours(chunk), shape, args.repeats)
            mark = "  <- default" if chunk == default else ""
            print(
                f"{shape!s:26} chunk {chunk:5}  {row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s"
                f" {row['beside_gradients_bytes'] / 1e9:7.3f} GB{mark}",
                flush=True,
            )
            rows.append({**asdict(shape), "chunk": chunk, **row})
    return rows


def bench_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The row kernel alone on one chunk, beside a copy of it; GB/s count one read and one write.

    Every tile's statistics and gradients are compared with float64's first.
    """
    rows: list[dict[str, Any]] = []
    for count, words in ROWS:
        torch.manual_seed(0)
        padded = -(-words // tiles.PADDING) * tiles.PADDING
        whole = torch.randn(count, padded, device="cuda").mul_(2).bfloat16()
        logits, other = whole[:, :words], torch.empty_like(whole)[:, :words]
        labels = torch.randint(words, (count,), device="cuda")
        labels[::16] = -100
        ms = median_ms(lambda x=logits, y=other: y.copy_(x), 4 * args.repeats)  # type: ignore[misc]
        print(f"rows {count} x {words}: a copy {1e3 * ms:6.0f} us {rate(other, ms):6.0f} GB/s")
        chosen = tiles.choose(logits.device, logits.dtype, words)
        for tile in TILES:
            other.copy_(logits)
            row = bench_tile(other, labels, tile, args.repeats)
            print(
                f"  block {tile.block:5} warps {tile.warps:2} programs {tile.programs}"
                f" unroll {tile.unroll}"
                f" {row['us']:6.0f} us {row['GB/s']:6.0f} GB/s, errors {row['lse error']:.1e}"
                f" {row['gradient error']:.1e}{'  <- default' if tile == chosen else ''}",
                flush=True,
            )
            rows.append({"rows": count, "words": words, **asdict(tile), **row})
        del whole, logits, other
    return rows


def rate(logits: Tensor, ms: float) -> float:
    """GB/s of one read and one write."""
    return 2 * logits.numel() * logits.element_size() / ms / 1e6


def bench_tile(logits: Tensor, labels: Tensor, tile: Tile, repeats: int) -> dict[str, Any]:
    """us, GB/s and errors of a tile, which turns these logits into gradients again and again.

    Raises:
        AssertionError: an error beyond the rounding of fp32 sums and bf16 gradients.
    """
    statistics = torch.empty(2, len(labels), device="cuda")
    terms = Terms(-100, 0.0, 1e-4, 0)
    first, its = logits[:ROWS_CHECKED].double(), labels[:ROWS_CHECKED]
    exact = torch.empty(2, ROWS_CHECKED, device="cuda", dtype=torch.float64)
    rows_torch.measure_and_differentiate(first, its, exact, terms)

    def call() -> None:
        rows_triton.launch(
            logits, labels, statistics, terms, measures=True, differentiates=True, tile=tile
        )

    call()
    wrong = (statistics[:, :ROWS_CHECKED] - exact).abs().max().item()
    ours = logits[:ROWS_CHECKED].double()
    # a rounding to bf16, and of probabilities e^-20 and less what fp32 makes of their exponents
    far = ((ours - first).abs() / (first.abs() * 2**-8 + 1e-12)).max().item()
    assert wrong < 1e-4, f"{tile}: statistics off by {wrong}"
    assert far < 1.02, f"{tile}: gradients off by {far} roundings"
    ms = median_ms(call, 4 * repeats)
    error = {"lse error": wrong, "gradient error": far}
    return {"us": 1e3 * ms, "GB/s": rate(logits, ms), **error}


def shapes(args: argparse.Namespace) -> list[Shape]:
    return [Shape(*s) for s in itertools.product(args.words, args.widths, args.tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--words", type=int, nargs="+", default=[50304, 128256], help="vocabulary sizes")
    add(
        "--widths",
        type=int,
        nargs="+",
        default=[768, 2048, 4096],
        help="of hidden states (default 768 2048 4096)",
    )
    add("--tokens", type=int, nargs="+", default=[16384, 32768], help="default 16384 32768")
    add(
        "--forms",
        nargs="+",
        choices=list(PEERS),
        default=list(PEERS),
        help="default: all found here",
    )
    add("--sweep", action="store_true", help="time our chunk sizes, no peers")
    add("--rows", action="store_true", help="time and check the row kernel's tiles, nothing else")
    add("--repeats", type=int, default=5, help="timed steps a row")
    add("--no-errors", action="store_true", help="time and memory only")
    add("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, torch sees none")
    about, began = where("liger_kernel"), time.perf_counter()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    part = bench_rows if args.rows else sweep if args.sweep else compare
    rows = part(args)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
