"""Speed and error of attention beside its peers.

    python scripts/bench_attention.py                       # 12 shapes, every backend found here
    python scripts/bench_attention.py --head-sizes 128 --lengths 4096 --backends triton cudnn

bf16, 16k tokens in all, hidden width 2048 (heads = 2048 / D). FLOPs: forward 4 B H S S D, half when
causal; backward 2.5 x forward. Times are medians by CUDA events, L2 flushed between calls. Errors
are of head 0 of batch 0 against float64; `x eager` divides by the error of eager PyTorch in bf16.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention, explain
from kernels.attention.reference import attention_reference

TOKENS, WIDTH = 16384, 2048
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, S, H, D] -> out [B, S, H, D]


@dataclass(frozen=True)
class Shape:
    head_size: int
    causal: bool
    length: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """[B, S, H, D]."""
        heads = WIDTH // self.head_size
        return max(TOKENS // self.length, 1), self.length, heads, self.head_size

    @property
    def forward_flops(self) -> float:
        B, S, H, D = self.sizes
        return 4.0 * B * H * S * S * D / (2 if self.causal else 1)

    def __str__(self) -> str:
        return f"D={self.head_size} {'causal' if self.causal else 'full'} S={self.length}"


def ours(backend: str, shape: Shape) -> Call | str:
    """The call, or why there is none."""
    probe = torch.empty(shape.sizes, dtype=torch.bfloat16, device="cuda")
    try:
        explain(probe, probe, probe, causal=shape.causal, backend=backend)
    except ValueError as refusal:
        return str(refusal)
    return lambda q, k, v: attention(q, k, v, causal=shape.causal, backend=backend)


def sdpa(backend: SDPBackend, shape: Shape) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=shape.causal
            )
        return out.transpose(1, 2)

    return call


@cache
def flex(shape: Shape) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else the 8 recompilations of one function end at the third shape
    S = shape.length
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)  # a kernel per length, as Flex is best
    return lambda q, k, v: compiled(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask
    ).transpose(1, 2)


def flash4(shape: Shape) -> Call | str:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as missing:
        return f"FlashAttention-4 is not installed: {missing}"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=shape.causal)
        return result[0] if isinstance(result, tuple) else result

    return call


BACKENDS: dict[str, Callable[[Shape], Call | str]] = {
    "hopper": lambda shape: ours("hopper", shape),
    "triton": lambda shape: ours("triton", shape),
    "fa2": lambda shape: sdpa(SDPBackend.FLASH_ATTENTION, shape),
    "cudnn": lambda shape: sdpa(SDPBackend.CUDNN_ATTENTION, shape),
    "flex": flex,
    "fa4": flash4,
}


def milliseconds(function: Callable[[], Any], warmup: int = 25, rep: int = 60) -> float:
    """Median time of a call on the GPU."""
    median: float = triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")
    return median


def fresh(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """q, k, v that want gradients, and the gradient of out."""
    torch.manual_seed(0)
    make = dict(dtype=torch.bfloat16, device="cuda")
    leaves = [torch.randn(shape.sizes, **make).requires_grad_() for _ in range(3)]
    return leaves, torch.randn(shape.sizes, **make)


def measure(call: Call, shape: Shape, check: "Check | None") -> dict[str, float]:
    """TFLOP/s of both passes, and errors."""
    leaves, d_out = fresh(shape)
    out = call(*leaves)
    found = {}
    if check is not None:
        grads = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        found = check.errors([out.detach(), *grads])

    def back() -> None:
        torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    with torch.no_grad():
        forward_ms = milliseconds(lambda: call(*leaves))
    backward_ms = milliseconds(back)
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
        self.exact = self.results(leaves, d_out, shape.causal, torch.float64)
        eager = self.results(leaves, d_out, shape.causal, torch.bfloat16)
        self.eager = [self.error(x, y) for x, y in zip(eager, self.exact, strict=True)]

    @staticmethod
    def head(x: Tensor) -> Tensor:
        return x[:1, :, :1]

    @staticmethod
    def error(x: Tensor, exact: Tensor) -> float:
        return (x.double() - exact).abs().max().item()

    @staticmethod
    def results(
        leaves: list[Tensor], d_out: Tensor, causal: bool, dtype: torch.dtype
    ) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in leaves]
        out, _ = attention_reference(*given, causal=causal, compute=dtype)
        return [out.detach(), *torch.autograd.grad(out, given, d_out.to(out.dtype))]

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        found = [self.error(self.head(x), y) for x, y in zip(results, self.exact, strict=True)]
        ratio = max(x / base for x, base in zip(found, self.eager, strict=True))
        named = {f"error_{n}": x for n, x in zip(self.NAMES, found, strict=True)}
        return {**named, "error_over_eager": ratio}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every backend at every shape; prints a row each."""
    rows, refused = [], set()
    print(f"{'shape':24} {'backend':8} {'fwd':>6} {'bwd':>6} TFLOP/s  {'fwd ms':>7} {'bwd ms':>7}"
          f"  {'out err':>8} {'grad err':>8} {'x eager':>7}")  # fmt: skip
    for shape in shapes(args):
        check = None if args.no_errors else Check(shape)
        for name in args.backends:
            if name == "flex" and not shape.causal and not args.flex_full:
                continue  # half a minute of compiling for what is plain attention
            try:
                call = BACKENDS[name](shape)
                found = call if isinstance(call, str) else measure(call, shape, check)
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
    return rows


def shapes(args: argparse.Namespace) -> list[Shape]:
    return [Shape(*s) for s in itertools.product(args.head_sizes, args.causal, args.lengths)]


def environment() -> dict[str, str]:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions["cudnn"] = str(torch.backends.cudnn.version())
    versions["python"] = platform.python_version()
    if importlib.util.find_spec("flash_attn") is not None:
        from importlib.metadata import packages_distributions, version

        for name in packages_distributions().get("flash_attn", []):
            versions[name] = version(name)
    return {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--head-sizes", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    add("--masks", nargs="+", choices=["causal", "full"], default=["causal", "full"])
    add("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    add("--flex-full", action="store_true", help="time FlexAttention without a mask too")
    add("--no-errors", action="store_true", help="time only")
    add("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    args.causal = [mask == "causal" for mask in args.masks]
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, torch sees none")
    about, began = environment(), time.perf_counter()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows = compare(args)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
