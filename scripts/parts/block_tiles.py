"""Other tiles of the passes of a block, and other ways of its products, timed beside the shipped.

For scripts/bench_block.py --sweep and --ways.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kernels.linear import cublaslt
from kernels.linear import kernel as passes_kernel
from kernels.linear.tiles import pass_tile
from kernels.norm import kernel as norm
from kernels.norm.tiles import backward_tile, forward_tile
from kernels.rope import kernel as rope
from kernels.rope.tiles import tile_for
from scripts.parts.block_sizes import EPS, Size, heads_of, randn
from scripts.parts.graph_timing import microseconds

Kinds = dict[str, tuple[Any, list[Any], Any]]  # pass -> call, its tiles, the shipped one


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
    kinds: Kinds = {
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
    _best_first(size, kinds)


def sweep_rotation(size: Size) -> None:
    device = torch.device("cuda")
    qkv, table, turning = heads_of(size)
    turned = tile_for(turning, size.head // 2, device)
    turns = [
        replace(turned, tokens=t, heads=h, warps=w)
        for t, h, w in itertools.product((1, 2, 4, 8, 16), (4, 8, 16, 32), (2, 4, 8))
        if 512 <= t * h * size.head // 2 <= 8192
    ]
    call = partial(rope.rotate, qkv, qkv, table, turning, False)
    _best_first(size, {"rotation": (call, turns, turned)})


def _best_first(size: Size, kinds: Kinds) -> None:
    for kind, (call, tiles, mine) in kinds.items():
        found = sorted((microseconds(partial(call, tile)), str(tile)) for tile in {*tiles, mine})
        told = [one for one in found if one in found[:4] or one[1] == str(mine)]
        for took, tile in told:
            mark = "  <- shipped" if tile == str(mine) else ""
            print(f"  {size.name} {kind}: {took:.1f} us {tile}{mark}", flush=True)


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
