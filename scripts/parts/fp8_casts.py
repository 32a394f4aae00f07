"""Calls of the fp8 cast kernels that bench_fp8.py times, with the bytes they read and write."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.fp8_cast import (
    E4M3,
    E5M2,
    absolute_maximum,
    cast_columnwise,
    cast_gradient,
    cast_hidden,
    cast_hidden_gradient,
    cast_norm,
    cast_rowwise,
    cast_tensorwise,
    hidden_maxima,
    kernel,
    mlp_kernel,
    reference,
)
from kernels.fp8_cast.tiles import Tile, Walk, choose
from kernels.norm.tiles import LONGEST

TILES = [
    Tile(rows, columns, warps)
    for rows, columns in ((64, 64), (128, 64), (128, 128), (64, 128), (32, 128), (128, 32))
    for warps in (4, 8)
]
BLOCKS = (4096, 8192, 16384, 32768)
WALKS = (
    Walk(8, 256, 4, 6, 3),
    Walk(16, 256, 8, 4, 3),
    Walk(8, 256, 4, 8, 2),
    Walk(4, 512, 4, 6, 4),
)

Timed = tuple[str, Callable[[], object], int]  # name, call, bytes


def shipped(M: int, K: int) -> Iterator[Timed]:
    """Kernels and compiled PyTorch on a bf16 activation [M, K], and an MLP's of K features."""
    x = torch.randn(M, K, device="cuda").bfloat16()
    maximum = reference.absolute_maximum(x)
    n = M * K

    @torch.compile(dynamic=False)
    def plain_maximum(x: Tensor) -> Tensor:
        return reference.absolute_maximum(x)

    @torch.compile(dynamic=False)
    def plain_both(x: Tensor, maximum: Tensor) -> tuple[Tensor, ...]:
        q, scale = reference.tensorwise(x, maximum, E4M3)
        return q, q.t().contiguous(), scale

    @torch.compile(dynamic=False)
    def plain_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rowwise(x, E4M3)

    yield "maximum, kernel", partial(absolute_maximum, x), 2 * n
    yield "maximum, compiled", partial(plain_maximum, x), 2 * n
    yield "both layouts, kernel", partial(cast_tensorwise, x, maximum, E4M3), 4 * n
    yield "both layouts e5m2, kernel", partial(cast_tensorwise, x, maximum, E5M2), 4 * n
    yield "both layouts, compiled", partial(plain_both, x, maximum), 4 * n
    yield "one layout, kernel", partial(cast_tensorwise, x, maximum, E4M3, columns=False), 3 * n
    yield "rowwise, kernel", partial(cast_rowwise, x, E4M3), 3 * n
    yield "rowwise, compiled", partial(plain_rows, x), 3 * n
    yield "columnwise, kernel", partial(cast_columnwise, x, E4M3), 3 * n
    yield "both layouts e5m2, sums", partial(cast_gradient, x, maximum, sums=True), 4 * n
    if K <= LONGEST:
        weight, bias = torch.randn(2, K, device="cuda").unbind()
        call = partial(cast_norm, x, weight, bias, eps=1e-5, centers=True)
        yield "LayerNorm, both layouts", call, 6 * n
    for gated, name in ((False, "GELU"), (True, "SwiGLU")):
        z = torch.cat([x, x.flip(0)], 1) if gated else x
        given = 2 * z.numel()
        yield f"{name}, maxima", partial(hidden_maxima, z, gated=gated), given
        yield f"{name}", partial(cast_hidden, z, maximum, gated=gated), given + 2 * n
        call = partial(cast_hidden_gradient, z, x, maximum, gated=gated)
        yield f"{name}, gradient", call, 2 * given + 2 * n


def tiles(M: int, K: int) -> Iterator[Timed]:
    """Tiles of the kernels, the chosen ones marked."""
    x = torch.randn(M, K, device="cuda").bfloat16()
    chosen = choose(x.device)
    maximum = reference.absolute_maximum(x)
    q, qt = (torch.empty(s, device="cuda", dtype=E4M3) for s in ((M, K), (K, M)))
    scale, scales = torch.empty((), device="cuda"), torch.empty(K, 1, device="cuda")
    sums = torch.empty(K, device="cuda")
    n = M * K

    def timed(what: str, tile: Any, best: Any, call: Callable[[], object], size: int) -> Timed:
        return f"{what} {tile}{'  <- chosen' if tile == best else ''}", call, size

    for block in BLOCKS:
        call = partial(kernel.absolute_maximum, x, block=block)
        yield timed("maximum", block, chosen.maximum, call, 2 * n)
    for tile in TILES:
        call = partial(kernel.tensorwise, x, maximum, q, qt, scale, None, tile)
        yield timed("tensorwise", tile, chosen.tensorwise, call, 4 * n)
        call = partial(kernel.tensorwise, x, maximum, q, qt, scale, sums, tile)
        yield timed("tensorwise, sums", tile, chosen.summed, call, 4 * n)
        call = partial(kernel.columnwise, x, qt, scales, tile)
        yield timed("columnwise", tile, chosen.columnwise, call, 3 * n)
    for gated, name, best in ((False, "GELU", chosen.hidden), (True, "SwiGLU", chosen.gated)):
        z = torch.cat([x, x.flip(0)], 1) if gated else x
        given = 2 * z.numel()
        for walk in WALKS if gated else ():
            call = partial(mlp_kernel.gated_maxima, z, walk)
            yield timed(f"{name}, maxima", walk, chosen.gated_maxima, call, given)
        to, turned = (torch.empty(s, device="cuda", dtype=E5M2) for s in (z.shape, z.t().shape))
        for tile in TILES:
            call = partial(mlp_kernel.cast, z, None, maximum, q, qt, scale, None, gated, tile)
            yield timed(name, tile, best, call, given + 2 * n)
            call = partial(mlp_kernel.cast, z, x, maximum, to, turned, scale, None, gated, tile)
            yield timed(f"{name}, gradient", tile, best, call, 2 * given + 2 * n)
            if not gated:
                call = partial(mlp_kernel.cast, z, x, maximum, to, turned, scale, sums, gated, tile)
                yield timed("GELU, gradient, sums", tile, chosen.hidden_summed, call, 6 * n)
