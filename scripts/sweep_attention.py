"""Time the portable attention kernels over tile sizes and print the best as lines of tiles.py.

    python scripts/sweep_attention.py                      # head sizes 64, 128; causal and full
    python scripts/sweep_attention.py --head-sizes 128 --masks causal --length 16384

A tile that gives another answer than the shipped one is reported, not timed. Of the backward, both
kernels run each time: `dkdv` varies the dK/dV tile under the shipped dQ tile, `dq` the reverse.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_attention import fresh, milliseconds
from torch import Tensor

from kernels.attention.portable import Features, backward, forward
from kernels.attention.tiles import Tile, Tiles, choose
from scripts.parts.attention_peers import Shape
from scripts.parts.where import where

# (query rows, key rows, warps, stages)
FORWARD = [
    (128, 128, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 3),
    (128, 64, 4, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 64, 8, 2),
]
DKDV = [
    (64, 128, 8, 3),
    (64, 128, 8, 2),
    (32, 128, 8, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 128, 8, 2),
]
DQ = [
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
]


@dataclass(frozen=True)
class Candidate:
    part: str  # forward, dkdv or dq
    tile: Tile
    run: Callable[[], tuple[Tensor, ...]]
    flops: float


class Sweep:
    """The inputs of one shape, and every way to run the kernels on them."""

    def __init__(self, shape: Shape) -> None:
        leaves, self.d_out = fresh(shape)
        self.q, self.k, self.v = (x.detach() for x in leaves)
        self.shape = shape
        self.features = Features(shape.head_size**-0.5, after=0 if shape.causal else -1)
        self.shipped = choose(self.q.device, shape.head_size, self.q.dtype, causal=shape.causal)
        self.out, self.lse = self.forward(self.shipped.forward)
        self.grads = self.backward(self.shipped)

    def forward(self, tile: Tile) -> tuple[Tensor, ...]:
        return forward(self.q, self.k, self.v, self.features, tile=tile)

    def backward(self, tiles: Tiles) -> tuple[Tensor, ...]:
        given = (self.q, self.k, self.v, self.out, self.lse)
        return backward(self.d_out, None, *given, self.features, tiles=tiles)[:3]

    def candidates(self) -> list[Candidate]:
        shipped = self.shipped
        ways: dict[str, tuple[list[Tile], Callable[[Tile], tuple[Tensor, ...]]]] = {
            "forward": (tiles(FORWARD), self.forward),
            "dkdv": (tiles(DKDV), lambda tile: self.backward(replace(shipped, dkdv=tile))),
            "dq": (tiles(DQ), lambda tile: self.backward(replace(shipped, dq=tile))),
        }
        return [
            Candidate(part, tile, lambda way=way, tile=tile: way(tile), self.flops(part))
            for part, (choices, way) in ways.items()
            for tile in choices
        ]

    def flops(self, part: str) -> float:
        return self.shape.forward_flops * (1.0 if part == "forward" else 2.5)

    def failure(self, candidate: Candidate) -> str:
        """Compile and run a candidate; '' when it gives the shipped tile's answer, else why not."""
        try:
            results = candidate.run()
            torch.cuda.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        expected = (self.out, self.lse) if candidate.part == "forward" else self.grads
        for result, right in zip(results, expected, strict=True):
            # bf16 results of another order of additions: within a few roundings of each other
            if not torch.allclose(result.float(), right.float(), rtol=0.05, atol=0.05):
                return f"WRONG by {(result.float() - right.float()).abs().max().item():.2g}"
        return ""


def tiles(sizes: list[tuple[int, int, int, int]]) -> list[Tile]:
    """With the copy engine where there is one, and the first two sizes without it."""
    with_engine = torch.cuda.get_device_capability() >= (9, 0)
    plain = [Tile(*size) for size in (sizes[:2] if with_engine else sizes)]
    return [Tile(*size, tma=True) for size in sizes if with_engine] + plain


def sweep(shape: Shape, rep: int) -> tuple[list[dict[str, Any]], str]:
    """Rows of every candidate, and the line for tiles.py."""
    work = Sweep(shape)
    candidates = work.candidates()
    with ThreadPoolExecutor() as pool:  # compiling is most of the time, and leaves Python free
        failures = list(pool.map(work.failure, candidates))
    rows = []
    never = float("inf")
    best: dict[str, tuple[float, Tile]] = {
        "forward": (never, work.shipped.forward),
        "dkdv": (never, work.shipped.dkdv),
        "dq": (never, work.shipped.dq),
    }
    for candidate, failure in zip(candidates, failures, strict=True):
        ms = never if failure else milliseconds(candidate.run, warmup=10, rep=rep)
        said = failure or f"{ms:7.3f} ms {candidate.flops / ms / 1e9:5.0f} TFLOP/s"
        print(f"{shape!s:24} {candidate.part:8} {spelt(candidate.tile):32} {said}", flush=True)
        rows.append({**asdict(shape), **asdict(candidate.tile), "part": candidate.part, "ms": ms})
        if ms < best[candidate.part][0]:
            best[candidate.part] = (ms, candidate.tile)
    pair = replace(work.shipped, dkdv=best["dkdv"][1], dq=best["dq"][1])
    pair_ms = milliseconds(lambda: work.backward(pair), warmup=10, rep=rep)
    line = (
        f"({shape.head_size}, {shape.causal}): Tiles("
        f"{', '.join(spelt(tile) for _, tile in best.values())}),"
        f"  # ms at {shape.length}: {best['forward'][0]:.3f} and {pair_ms:.3f}"
    )
    return rows, line


def spelt(tile: Tile) -> str:
    """As tiles.py writes it."""
    numbers = f"({tile.queries}, {tile.keys}, {tile.warps}, {tile.stages})"
    return ("_tma" if tile.tma else "Tile") + numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--head-sizes", type=int, nargs="+", default=[64, 128], help="default 64 128")
    add(
        "--masks",
        nargs="+",
        choices=["causal", "full"],
        default=["causal", "full"],
        help="default: both",
    )
    add("--length", type=int, default=4096, help="tokens (default 4096)")
    add("--rep", type=int, default=30, help="milliseconds of timing per tile")
    add("--json", type=Path, help="write every row there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, torch sees none")
    about, began = where(), time.perf_counter()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows, lines = [], []
    for head_size, mask in itertools.product(args.head_sizes, args.masks):
        found, line = sweep(Shape(head_size, mask, args.length), args.rep)
        rows.extend(found)
        lines.append(line)
    print("\nfor kernels/attention/tiles.py:", *lines, sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
