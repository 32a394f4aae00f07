"""Why a fused attention kernel is fast: the trick on a few numbers, then counted, then measured.

    python scripts/explain_attention.py                      # about half a minute on a CPU
    python scripts/explain_attention.py --lengths 1024,4096,16384 --picture attention.svg
    python scripts/explain_attention.py --only trick          # no measurement

For whoever has just heard of FlashAttention (Dao et al. 2022, arXiv:2205.14135). Eager attention
here is what one would write first: a product, a mask, a softmax, a product, each a pass over the
whole matrix of scores. Fused is this repository's `attention`: on an NVIDIA GPU its own kernel, on
a CPU PyTorch's, which works by the same idea.
"""

import argparse
import math
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtrain.tracking.charts import Curve, line_chart, stacked
from kernels.attention import attention

MIB = 1 << 20
TILE = 128  # queries that one program of the fused kernel owns
PARTS = ("trick", "traffic", "measured")


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal; q, k, v [B, T, H, D]. Passes over [B, H, T, T]: 6."""
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.transpose(-1, -2)  # written: 1
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, -math.inf)  # read, written: 2
    weights = scores.softmax(-1)  # read, written: 2
    return (weights @ v).transpose(1, 2)  # read: 1


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


def eager_traffic(B: int, T: int, H: int, D: int, size: int) -> int:
    """Bytes that a forward pass moves to and from memory; size: bytes of a number."""
    scores = B * H * T * T
    return (6 * scores + 6 * B * H * T * D) * size  # q scaled: read, written; q, k, v read; out


def fused_traffic(B: int, T: int, H: int, D: int, size: int) -> int:
    """Likewise, at most: every tile of queries reads the keys and values before it, and none of
    them is found in a cache. q is read once, out written once, and 4 bytes a row for its sum."""
    tiles = -(-T // TILE)
    keys_and_values = sum(min(T, (tile + 1) * TILE) for tile in range(tiles)) * 2 * D
    return B * H * ((2 * T * D + keys_and_values) * size + 4 * T)


def show_trick() -> None:
    """One query, six keys, two at a time."""
    scores = [1.0, 3.0, 2.0, 5.0, 0.5, 4.0]
    values = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    print("1. The trick: a softmax that never sees all of its scores\n")
    print(f"   One query has the scores {scores} with six keys, whose values are")
    print(f"   {values}. The output is sum(exp(score) x value) / sum(exp(score)).")
    print("   To stay within a float's range, the largest score is subtracted first, so it seems")
    print("   that all scores must be there before the first exp. They need not: keep the largest")
    print("   so far, and when a larger one comes, shrink what was summed by exp(old - new).\n")
    print(
        f"   {'keys':<8}{'scores':<14}{'largest':>8}{'shrink by':>11}{'sum':>9}{'output sum':>12}"
    )
    peak, total, out = -math.inf, 0.0, 0.0
    for first in range(0, len(scores), 2):
        own, theirs = scores[first : first + 2], values[first : first + 2]
        new = max(peak, *own)
        shrink = math.exp(peak - new)
        weights = [math.exp(score - new) for score in own]
        total = total * shrink + sum(weights)
        out = out * shrink + sum(w * value for w, value in zip(weights, theirs, strict=True))
        peak = new
        print(
            f"   {first + 1}, {first + 2:<5}{own!s:<14}{peak:>8.1f}{shrink:>11.4f}"
            f"{total:>9.4f}{out:>12.4f}"
        )
    exact = torch.tensor(scores).double().softmax(0) @ torch.tensor(values).double()
    print(f"\n   {out:.4f} / {total:.4f} = {out / total:.6f}; all at once: {float(exact):.6f}")
    print("   So two keys, or 128, can be worked on in the fast memory inside a processor, and the")
    print("   matrix of scores is never written to the large and slow one.\n")


class Moved(TorchDispatchMode):
    """Bytes that the operations run inside read and write: each operand once, views nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return out


@torch.no_grad()
def executed_traffic(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> int:
    """Bytes that the operations of `eager` moved, run on tensors without memory."""
    with torch.device("meta"):
        q, k, v = (torch.empty(B, T, H, D, dtype=dtype) for _ in range(3))
    with Moved() as moved:
        eager(q, k, v)
    return moved.total


def show_traffic(
    lengths: list[int], B: int, H: int, D: int, dtype: torch.dtype
) -> dict[str, list[float]]:
    size = dtype.itemsize
    print("2. Counted: bytes to and from memory in a forward pass\n")
    print(f"   batch {B}, {H} heads of {D}, {size} bytes a number; tiles of {TILE} queries\n")
    print(f"   {'':>8}{'one matrix':>12}{'eager':>24}{'fused':>12}")
    print(f"   {'length':>8}{'of scores':>12}{'executed':>12}{'formula':>12}{'formula':>12}   MiB")
    rows: dict[str, list[float]] = {"eager": [], "fused": []}
    for T in lengths:
        slow, fast = (count(B, T, H, D, size) / MIB for count in (eager_traffic, fused_traffic))
        rows["eager"].append(slow)
        rows["fused"].append(fast)
        matrix, ran = B * H * T * T * size / MIB, executed_traffic(B, T, H, D, dtype) / MIB
        print(
            f"   {T:>8,}{matrix:>12,.1f}{ran:>12,.1f}{slow:>12,.1f}{fast:>12,.1f}"
            f"   {slow / fast:.1f}x less"
        )
    print(
        "\n   Eager moves the matrix of scores six times: product 1, mask 2, softmax 2, product 1;"
    )
    print("   executed is what PyTorch's operations read and wrote, with the mask itself.")
    print("   Fused reads keys and values once for every tile of queries, and mostly from a cache,")
    print("   so that its figure is the most it can be. Both do the same products, 4 x T^2 x D x")
    print("   heads operations; fused leaves out the half of them that the causal mask hides.\n")
    return rows


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside held at a time: what a GPU's allocator counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def measure(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], repeats: int
) -> tuple[float, float] | None:
    """(MiB at the peak, milliseconds at best) of forward and backward; None where it does not
    fit."""
    cuda = inputs[0].is_cuda

    def once() -> None:
        for x in inputs:
            x.grad = None
        compute(*inputs).sum().backward()

    try:
        once()  # compiles and warms up
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once()
            torch.cuda.synchronize()
            held = torch.cuda.max_memory_allocated() - before
        else:
            with Peak() as mode:
                once()
            held = mode.peak
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            once()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return None
    return held / MIB, min(times) * 1e3


def show_measured(
    lengths: list[int],
    B: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, list[tuple[float, float] | None]]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"3. Measured here ({name}, {str(dtype).removeprefix('torch.')}): forward and backward\n")
    print(f"   {'':>8}{'peak memory, MiB':>24}{'milliseconds':>32}")
    columns = f"{'eager':>12}{'fused':>12}{'ratio':>8}"
    print(f"   {'length':>8}{columns}{columns}")
    rows: dict[str, list[tuple[float, float] | None]] = {"eager": [], "fused": []}
    for T in lengths:
        inputs = [torch.randn(B, T, H, D, device=device, dtype=dtype) for _ in range(3)]
        for x in inputs:
            x.requires_grad_()
        slow, fast = measure(eager, inputs, repeats), measure(fused, inputs, repeats)
        rows["eager"].append(slow)
        rows["fused"].append(fast)
        line = f"   {T:>8,}"
        for index, form in ((0, ",.1f"), (1, ",.2f")):
            cells = [format(found[index], form) if found else "no room" for found in (slow, fast)]
            ratio = f"{slow[index] / fast[index]:.1f}x" if slow and fast else ""
            line += f"{cells[0]:>12}{cells[1]:>12}{ratio:>8}"
        print(line, flush=True)
    print(
        "\n   Eager keeps the weights of every query and key for the backward pass: four times the"
    )
    print("   memory for twice the length. Fused keeps one number a row, the logarithm of its sum,")
    print("   and computes the weights again, tile by tile, which costs less than reading them.\n")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--only", choices=PARTS, help="one part instead of all three")
    parser.add_argument("--lengths", help="of sequences (default: 256 to 2048, on a GPU to 16384)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--heads", type=int, default=8 if cuda else 4, help="heads")
    parser.add_argument("--head-size", type=int, default=64, help="numbers of a head (default 64)")
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3, help="timings; best of")
    parser.add_argument(
        "--picture", type=Path, help="traffic, memory and time over the length, into this .svg"
    )
    options = parser.parse_args()
    text = options.lengths or ("512,1024,2048,4096,8192,16384" if cuda else "256,512,1024,2048")
    try:
        lengths = [int(length) for length in text.split(",")]
        if min(lengths) < 1:
            raise ValueError
    except ValueError:
        print(f"explain_attention: --lengths {text}: write 512,1024", file=sys.stderr)
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = (options.batch, options.heads, options.head_size)
    if options.only == "trick" and options.picture is not None:
        print("explain_attention: --picture draws what parts 2 and 3 find", file=sys.stderr)
        return 2
    if options.only in (None, "trick"):
        show_trick()
    charts: list[tuple[str, str]] = []
    if options.only in (None, "traffic"):
        moved = show_traffic(lengths, *shape, dtype)
        charts.append(("counted: memory traffic of a forward pass, MiB", draw(lengths, moved)))
    if options.only in (None, "measured"):
        rows = show_measured(lengths, *shape, dtype, device, options.repeats)
        for index, what in enumerate(("peak memory, MiB", "time, ms")):
            own = {name: [x and x[index] for x in found] for name, found in rows.items()}
            charts.append((f"measured: {what}, forward and backward", draw(lengths, own)))
    if options.picture is not None:
        options.picture.write_text(stacked([chart for chart in charts if chart[1]]))
        print(f"   {options.picture}")
    return 0


def draw(lengths: list[int], rows: Mapping[str, Sequence[float | None]]) -> str:
    curves = [
        Curve(
            [(T, value) for T, value in zip(lengths, values, strict=True) if value],
            name, color, dots=True,
        )
        for color, (name, values) in enumerate(rows.items())
    ]  # fmt: skip
    return line_chart(curves, x="length", y="", log_x=True, log_y=True)


if __name__ == "__main__":
    sys.exit(main())
