"""What bench_hopper.py runs: shapes, feature cases, variants of the tiles; compiles them ahead."""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from supervise import say
from torch import Tensor

from kernels.attention.hopper import plan
from kernels.attention.hopper.tiles import BACKWARD, choose_forward

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
    Shape(D, causal, S) for D in (128, 64) for causal in (True, False) for S in (1024, 4096, 16384)
]


def forward_variants(shape: Shape) -> dict[str, Any]:
    base = choose_forward(shape.D, shape.causal, shape.S)
    found = {"shipped": base}
    if shape.causal:
        found["16M"] = replace(base, together=16 * MIB)
        found["64M"] = replace(base, together=64 * MIB)
    else:
        found["draw"] = replace(base, draw=True)
    if shape.D == 64:
        found["2x64 4 stages"] = replace(base, consumers=2, stages=4, registers=240)
        found["3x64 2 stages"] = replace(base, consumers=3, stages=2, registers=160)
        found["3x64 3 stages"] = replace(base, consumers=3, stages=3, registers=160)
    return {name: tile for name, tile in found.items() if name == "shipped" or tile != base}


def backward_variants(shape: Shape) -> dict[str, Any]:
    base = BACKWARD[shape.D, shape.causal]
    found = {
        "shipped": base,
        "1 head": replace(base, together=0),
        "8M": replace(base, together=8 * MIB),
        "late" if base.early else "early": replace(base, early=not base.early),
    }
    if not shape.causal:
        found["stride" if base.draw else "draw"] = replace(base, draw=not base.draw)
    if shape.D == 128:
        found["3 stages" if base.stages == 2 else "2 stages"] = replace(
            base, stages=5 - base.stages
        )
    return found


FEATURES: list[dict[str, Any]] = [
    dict(D=D, causal=causal, **more)
    for D in (128, 64)
    for causal, more in [
        (True, dict(T=256, S=256)),
        (False, dict(T=256, S=256)),
        (True, dict(T=1000, S=1000, H=6, H_kv=2)),
        (False, dict(T=333, S=1001, H=4, H_kv=1)),
        (True, dict(T=77, S=200, H=2)),
        (True, dict(T=500, S=500, H=4, H_kv=2, alibi=True)),
        (True, dict(T=640, S=640, H=4, dtype=torch.float16, joint=True)),
        (False, dict(T=1, S=1, H=2)),
    ]
]


@dataclass(frozen=True)
class Job:
    """One call to compile: both passes, or the one whose tile is given."""

    D: int
    causal: bool
    T: int = 128
    S: int = 128
    H: int = 2
    H_kv: int = 2
    alibi: bool = False
    dtype: torch.dtype = torch.bfloat16
    d_lse: bool = False
    forward: Any = None
    backward: Any = None


def compile_one(job: Job) -> None:
    """Leave a call's binaries in Triton's cache. Runs in a process of its own."""
    q = torch.zeros(1, job.T, job.H, job.D, dtype=job.dtype)
    k = torch.zeros(1, job.S, job.H_kv, job.D, dtype=job.dtype)
    options = plan.Options(job.causal, 0.1, job.alibi)
    tensors: dict[str, Tensor | None] = dict(q=q, k=k, v=k, d_out=q, **plan.forward_buffers(q))
    tensors["slopes"] = torch.zeros(job.H) if job.alibi else None
    tensors["d_lse"] = torch.zeros(1, job.H, job.T) if job.d_lse else None
    tensors["counter"] = torch.zeros(1, dtype=torch.int32)
    launches = []
    if job.forward:
        launches.append(plan.plan_forward(q, k, options, job.forward, 1))
    if job.backward:
        launches += plan.plan_backward(q, k, q, options, job.backward, 1)
        tensors |= plan.backward_buffers(q, k, job.backward)
    for launch in launches:
        launch.kernel.warmup(**launch.bind(tensors), grid=launch.grid, num_warps=4)


def compile_all(shapes: list[Shape], base: bool) -> None:
    jobs: dict[Job, None] = {}  # in order, each once
    for case in FEATURES:
        call = {name: value for name, value in case.items() if name != "joint"}
        call["H_kv"] = call.get("H_kv", call.get("H", 4))
        call["H"] = call.get("H", 4)
        tiles = dict(
            forward=choose_forward(case["D"], case["causal"], case["T"]),
            backward=BACKWARD[case["D"], case["causal"]],
        )
        jobs[Job(d_lse=True, **tiles, **call)] = None
    for shape in shapes:
        for kind, variants in (("forward", forward_variants), ("backward", backward_variants)):
            for name, tile in variants(shape).items():
                same = replace(tile, together=0)  # not compiled in
                if not base or name == "shipped":
                    jobs[Job(shape.D, shape.causal, **{kind: same})] = None
    start, n = time.time(), min(14, os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        for i, _ in enumerate(pool.imap_unordered(compile_one, jobs)):
            print(f"compiled {i + 1} of {len(jobs)}", flush=True)
    say(f"{len(jobs)} calls compiled by {n} processes in {time.time() - start:.0f} s")
