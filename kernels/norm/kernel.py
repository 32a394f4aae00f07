"""LayerNorm and RMSNorm with the residual connection: each pass reads and writes a row once.

Dims: N rows, D columns, BLOCK = D padded to a power of two, R rows of a turn.

    s = x + branch         h = (s - mean) rstd        y = h w + b        RMSNorm: mean = 0, no b

    g = dy w               ds = rstd (g - avg(g) - h avg(g h)) + what comes along the stream
    dw = sum of dy h       db = sum of dy              over all rows

If wished, y again, and the sum of what comes along the stream.

In backward a program walks over its share of the rows and keeps dw and db in registers; what each
has at its end is added up by a second, small kernel, in a fixed order.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device, processors
from kernels.launch import run
from kernels.norm.tiles import Tile, backward_tile, forward_tile
from kernels.sizes import cdiv, padded


@triton.jit
def norm_forward_kernel(
    x_ptr, branch_ptr,  # [N, D]; branch may be None
    weight_ptr, bias_ptr,  # [D]; bias may be None
    y_ptr, stream_ptr,  # [N, D]: norm(s), and s where there is a branch
    mean_ptr, rstd_ptr,  # [N] fp32; no mean for RMSNorm
    N, D, eps,
    CENTERS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    here = (rows < N)[:, None] & inside[None, :]
    at = rows[:, None] * D + columns[None, :]
    s = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        s += tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
        rounded = s.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + at, rounded, mask=here)
        s = rounded.to(tl.float32)  # what backward sees
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERS:
        mean = tl.sum(s, 1) / D
        tl.store(mean_ptr + rows, mean, mask=rows < N)
        s = tl.where(inside[None, :], s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    y = s * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def norm_backward_kernel(
    dy_ptr, ds_ptr,  # [N, D]; ds, of the stream, may be None
    stream_ptr,  # [N, D]
    weight_ptr, bias_ptr,  # [D]; bias may be None
    mean_ptr, rstd_ptr,  # [N] fp32
    dx_ptr, y_ptr,  # [N, D]; y, which forward had, may be None
    sums_ptr,  # [programs, KINDS, D] fp32: of dw; of db where there is a bias; of ds with SUMS
    N, D,
    CENTERS: tl.constexpr, SUMS: tl.constexpr, KINDS: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None and bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    for turn in tl.range(program, tl.cdiv(N, R), programs, num_stages=STAGES):
        rows = (turn * R + tl.arange(0, R)).to(tl.int64)
        valid = rows < N
        here = valid[:, None] & inside[None, :]
        at = rows[:, None] * D + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        h = tl.load(stream_ptr + at, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)
        if CENTERS:
            h -= tl.load(mean_ptr + rows, mask=valid, other=0.0)[:, None]
        h *= rstd[:, None]
        if y_ptr is not None:
            y = h * weight[None, :]
            if bias_ptr is not None:
                y += bias[None, :]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)
        g = dy * weight[None, :]  # 0 in columns past the end, where h is not
        dw += tl.sum(dy * h, 0)
        ds = g - h * (tl.sum(g * h, 1) / D)[:, None]
        if bias_ptr is not None:
            db += tl.sum(dy, 0)
        if CENTERS:
            ds -= (tl.sum(g, 1) / D)[:, None]
        ds *= rstd[:, None]
        if ds_ptr is not None:
            came = tl.load(ds_ptr + at, mask=here, other=0.0).to(tl.float32)
            ds += came
            if SUMS:
                along += tl.sum(came, 0)
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=here)
    own = sums_ptr + program.to(tl.int64) * KINDS * D
    tl.store(own + columns, dw, mask=inside)
    if bias_ptr is not None:
        tl.store(own + D + columns, db, mask=inside)
    if SUMS:
        tl.store(own + (KINDS - 1) * D + columns, along, mask=inside)


@triton.jit
def add_up_kernel(
    sums_ptr,  # [programs, width] fp32
    total_ptr,  # [width]
    programs, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Over the programs, always in the same order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        here = (rows < programs)[:, None] & inside[None, :]
        total += tl.load(sums_ptr + rows[:, None] * width + columns[None, :], mask=here, other=0.0)
    value = tl.sum(total, 0)
    tl.store(total_ptr + columns, value.to(total_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centers: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, branch [N, D] contiguous -> y, stream (empty without a branch), mean (empty for RMSNorm),
    rstd."""
    N, D = x.shape
    y = torch.empty_like(x)
    stream = torch.empty_like(x) if branch is not None else x.new_empty(0)
    mean = torch.empty(N if centers else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    tile = tile or forward_tile(D, x.device)
    with on_device(x):
        run(
            norm_forward_kernel, (cdiv(N, tile.rows),),
            x, branch, weight, bias, y, stream, mean, rstd, N, D, eps,
            CENTERS=centers, R=tile.rows, BLOCK=padded(D), num_warps=tile.warps,
        )  # fmt: skip
    return y, stream, mean, rstd


def backward(
    dy: Tensor,
    ds: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centers: bool,
    again: bool = False,
    sums: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, ds, stream [N, D] contiguous -> dx [N, D]; dw, db where there is a bias, and with `sums`
    the sum of ds over the rows, [1 to 3, D] in weight's dtype; with `again` forward's y (else [0]).
    """
    N, D = dy.shape
    tile = tile or backward_tile(D, dy.device, bias is not None)
    programs = min(tile.programs * processors(dy.device), cdiv(N, tile.rows))
    dx = torch.empty_like(stream)
    y = torch.empty_like(stream) if again else stream.new_empty(0)
    kinds = 1 + (bias is not None) + sums
    parts = torch.empty((programs, kinds, D), dtype=torch.float32, device=dy.device)
    total = torch.empty((kinds, D), dtype=weight.dtype, device=dy.device)
    with on_device(dy):
        run(
            norm_backward_kernel, (programs,),
            dy, ds, stream, weight, bias, mean, rstd, dx, y if again else None, parts, N, D,
            CENTERS=centers, SUMS=sums, KINDS=kinds, R=tile.rows,
            BLOCK=padded(D), STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    add_up(parts.view(programs, -1), total.view(-1))
    return dx, total, y


def add_up(sums: Tensor, total: Tensor) -> None:
    """total [width] = the sum over programs of sums [programs, width] fp32, contiguous both."""
    programs, width = sums.shape
    # 528 x 2048 in 3.3 µs; at 64 x 32 in 4 warps 6.6 (one H200, 2026-11-28)
    rows, columns = (16, 16) if sums.device.type == "cpu" else (256, 16)
    with on_device(sums):
        run(
            add_up_kernel, (cdiv(width, columns),),
            sums, total, programs, width, ROWS=rows, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
