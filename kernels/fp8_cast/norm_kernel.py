"""A norm's output cast to fp8 as it is computed, in Triton. See norm.py.

Dims: N tokens, D features, BLOCK = D padded to a power of two, R rows of a program of the first
kernel, which finds what the second one needs of each row; that one takes tiles, as the other casts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device
from kernels.fp8_cast import tiles
from kernels.fp8_cast.kernel import ONE_PASS, bits_of, factors, put
from kernels.fp8_cast.tiles import Tile
from kernels.launch import run
from kernels.norm import tiles as norm_tiles
from kernels.sizes import cdiv, padded


@triton.jit
def statistics_kernel(
    x_ptr,  # [N, D]
    weight_ptr, bias_ptr,  # [D]; bias may be None
    mean_ptr, rstd_ptr,  # [N] fp32; no mean for RMSNorm
    bounds_ptr,  # [2] fp32: what no number of the norm exceeds, and no row's length
    N, D, eps, root,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """root: sqrt(D)."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    at = rows[:, None] * D + columns[None, :]
    s = tl.load(x_ptr + at, mask=(rows < N)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(s, 1) / D
        tl.store(mean_ptr + rows, mean, mask=rows < N)
        s = tl.where(inside[None, :], s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    if tl.program_id(0) == 0:
        bound = root * largest(weight_ptr, columns, inside)
        length = bound
        if bias_ptr is not None:
            bound += largest(bias_ptr, columns, inside)
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            length += tl.sqrt_rn(tl.sum(bias * bias, 0))
        tl.store(bounds_ptr, bound)
        tl.store(bounds_ptr + 1, length)


@triton.jit
def largest(ptr, columns, inside):
    """max |x|, NaN where there is one."""
    x = tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.max(bits_of(x), 0).to(tl.float32, bitcast=True)


@triton.jit
def norm_cast_kernel(
    x_ptr,  # [N, D]
    weight_ptr, bias_ptr,  # [D]; bias may be None
    mean_ptr, rstd_ptr,  # [N] fp32; no mean for RMSNorm
    bounds_ptr,  # [2] fp32
    q_ptr, qt_ptr,  # [N, D] and [D, N] fp8; one may be None
    scale_ptr,  # 0-dim fp32
    N, D,
    TOP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # from the last tile to the first: what was read last for the statistics is still in L2
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(D, BK)
    rows = (tile // across * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tile % across * BK + tl.arange(0, BK)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    y = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    y = y.to(tl.float32)
    if mean_ptr is not None:
        y -= tl.load(mean_ptr + rows, mask=rows < N, other=0.0)[:, None]
    y *= tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
    y *= tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    factor, scale = factors(tl.load(bounds_ptr).to(tl.int32, bitcast=True), TOP)
    # rounded, as if it had been written: numbers of 16 bits may move to other threads (ONE_PASS)
    put(y.to(x_ptr.dtype.element_ty), factor, q_ptr, qt_ptr, rows, columns, inside, N, D)
    if tile == 0:
        tl.store(scale_ptr, scale)


def cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, q: Tensor, qt: Tensor | None,
    scale: Tensor, mean: Tensor | None, rstd: Tensor, bounds: Tensor, tile: Tile | None = None,
) -> None:  # fmt: skip
    """norm(x) into q [N, D] and, transposed, qt if that is there; its scale; mean (None: RMSNorm)
    and rstd [N]; bounds [2], of its numbers and of its rows' lengths. All contiguous."""
    N, D = x.shape
    tile = tile or tiles.choose(x.device).tensorwise
    whole = norm_tiles.forward_tile(D, x.device)
    layouts = [(q, qt)] if qt is None or ONE_PASS else [(q, None), (None, qt)]
    with on_device(x):
        run(
            statistics_kernel, (cdiv(N, whole.rows),),
            x, weight, bias, mean, rstd, bounds, N, D, eps, D**0.5,
            R=whole.rows, BLOCK=padded(D), num_warps=whole.warps,
        )  # fmt: skip
        for lying, turned in layouts:
            run(
                norm_cast_kernel, (cdiv(N, tile.rows) * cdiv(D, tile.columns),),
                x, weight, bias, mean, rstd, bounds, lying, turned, scale, N, D,
                TOP=torch.finfo(q.dtype).max, BM=tile.rows, BK=tile.columns,
                num_warps=tile.warps,
            )  # fmt: skip
