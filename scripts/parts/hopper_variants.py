"""What bench_hopper.py runs: shapes and variants of the tiles; compiles them ahead."""

import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.attention.hopper import plan
from kernels.attention.hopper.launch import OPTIONS
from kernels.attention.hopper.tiles import (
    FORWARD,
    FORWARD_128_ROWS,
    choose_backward,
    choose_forward,
)
from scripts.parts.hopper_features import FEATURES, TIMED
from scripts.parts.supervise import say

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    D: int
    causal: bool
    S: int

    @property
    def name(self) -> str:
        return f"{self.D} {self.mask} {self.S}"

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def flops(self) -> float:
        return 4 * 16384 * self.S * 2048 * (0.5 if self.causal else 1.0)


SHAPES = [
    Shape(D, causal, S) for S in (1024, 4096, 16384) for D in (128, 64) for causal in (True, False)
]


def forward_variants(shape: Shape) -> dict[str, Any]:
    base = choose_forward(shape.D, shape.causal, shape.S)
    found = {"shipped": base}
    if shape.D == 64:
        tile = FORWARD_128_ROWS if base.consumers == 3 else FORWARD[64, shape.causal]
        found[f"{tile.consumers}x64"] = tile
    return found


def backward_variants(shape: Shape) -> dict[str, Any]:
    base = choose_backward(shape.D, shape.causal, shape.S)
    found = {"shipped": base}
    if shape.D == 128:
        found["not ahead" if base.ahead else "ahead"] = replace(base, ahead=not base.ahead)
    return found


@dataclass(frozen=True)
class Job:
    """One call to compile: the passes whose tile is given."""

    D: int
    options: plan.Options
    T: int = 128
    S: int = 128
    H: int = 2
    H_kv: int = 2
    dtype: torch.dtype = torch.bfloat16
    d_lse: bool = False
    forward: Any = None
    backward: Any = None


def compile_one(job: Job) -> None:
    """Leave a call's binaries in Triton's cache. Runs in a process of its own."""
    q = torch.zeros(1, job.T, job.H, job.D, dtype=job.dtype)
    k = torch.zeros(1, job.S, job.H_kv, job.D, dtype=job.dtype)
    options = job.options
    tensors: dict[str, Tensor | None] = dict(q=q, k=k, v=k, d_out=q, **plan.forward_buffers(q))
    tensors["sinks"] = torch.zeros(job.H) if options.sinks else None
    bounds = torch.zeros(1, 2, job.T, dtype=torch.int32)
    tensors["bounds"] = bounds if options.documents else None
    tensors["slopes"] = torch.zeros(job.H) if options.alibi else None
    tensors["d_lse"] = torch.zeros(1, job.H, job.T) if job.d_lse else None
    launches = []
    if job.forward:
        launches.append(plan.plan_forward(q, k, options, job.forward, 1))
    if job.backward:
        launches += plan.plan_backward(q, k, q, options, job.backward, 1)
        tensors |= plan.backward_buffers(q, k, job.backward)
    tensors["counter"] = torch.zeros(1, dtype=torch.int32)
    for launch in launches:
        launch.kernel.warmup(**launch.bind(tensors), grid=launch.grid, **OPTIONS)


def compile_all(shapes: list[Shape], parts: list[str], base: bool) -> None:
    """Compile what the chosen parts of bench_hopper.py need, in many processes."""
    jobs: dict[Job, None] = {}  # in order, each once
    wanted = [*FEATURES] * ("features" in parts) + [*TIMED] * ("timed" in parts)
    for feature in wanted:
        f, options = feature, feature.options()
        q, k = torch.empty(f.B, f.T, f.H, f.D), torch.empty(f.B, f.S, f.H_kv, f.D)
        backward = plan.backward_tile(q, k, options) if f.backward else None
        tiles = dict(forward=plan.forward_tile(q, k, options), backward=backward)
        sizes = dict(T=f.T, S=f.S, H=f.H, H_kv=f.H_kv, dtype=f.dtype)
        jobs[Job(f.D, options, **sizes, d_lse=feature in FEATURES, **tiles)] = None
    kinds = {"forward": forward_variants, "backward": backward_variants}
    for shape in shapes:
        for kind, variants in kinds.items():
            for name, tile in variants(shape).items():
                if name == "shipped" or (kind in parts and not base):
                    options = plan.Options(shape.causal, 0.1)
                    jobs[Job(shape.D, options, **{kind: tile})] = None
    start, n = time.time(), min(14, os.cpu_count() or 1, len(jobs))
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        for i, _ in enumerate(pool.imap_unordered(compile_one, jobs)):
            print(f"compiled {i + 1} of {len(jobs)}", flush=True)
    say(f"{len(jobs)} calls compiled by {n} processes in {time.time() - start:.0f} s")
