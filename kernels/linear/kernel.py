"""What stands between the products: passes over memory, in Triton.

Dims: N tokens, F features. A program owns a range of rows and BLOCK columns and walks down its rows
R at a time, so that sums over tokens stay in registers; what each has is added up by a second
kernel in a fixed order (kernels/norm).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device, processors
from kernels.launch import run
from kernels.linear.activations import gelu, silu
from kernels.linear.tiles import Tile, cast_block, pass_tile
from kernels.norm.kernel import add_up
from kernels.sizes import cdiv


@triton.jit
def gelu_backward_kernel(
    d_ptr,  # [N, F]: of gelu's output; of its input afterwards
    z_ptr,  # [N, F]
    a_ptr,  # [N, F]: gelu(z) again; may be None
    sums_ptr,  # [ranges, F] fp32: of d; may be None
    N, F, rows_each,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    total = tl.zeros([R, BLOCK], tl.float32)
    for start in tl.range(first, last, R, num_stages=STAGES):
        rows = (start + tl.arange(0, R)).to(tl.int64)
        here = (rows < last)[:, None] & inside[None, :]
        at = rows[:, None] * F + columns[None, :]
        d = tl.load(d_ptr + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=here, other=0.0).to(tl.float32)
        a, slope = gelu(z)
        if a_ptr is not None:
            tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=here)
        d *= slope
        tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=here)
        if sums_ptr is not None:
            total += d
    if sums_ptr is not None:
        own = sums_ptr + tl.program_id(0).to(tl.int64) * F
        tl.store(own + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_ptr,  # [N, F]: of a
    z_ptr,  # [N, 2 F]
    dz_ptr,  # [N, 2 F]
    a_ptr,  # [N, F]: swiglu(z) again; may be None
    sums_ptr,  # [ranges, 2 F] fp32: of dz; may be None
    N, F, rows_each,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    total_g = tl.zeros([R, BLOCK], tl.float32)
    total_u = tl.zeros([R, BLOCK], tl.float32)
    for start in tl.range(first, last, R, num_stages=STAGES):
        rows = (start + tl.arange(0, R)).to(tl.int64)
        here = (rows < last)[:, None] & inside[None, :]
        at = rows[:, None] * F + columns[None, :]
        wide = rows[:, None] * (2 * F) + columns[None, :]
        d = tl.load(d_ptr + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(z_ptr + wide, mask=here, other=0.0).to(tl.float32)
        u = tl.load(z_ptr + F + wide, mask=here, other=0.0).to(tl.float32)
        gate, slope = silu(g)
        if a_ptr is not None:
            tl.store(a_ptr + at, (gate * u).to(a_ptr.dtype.element_ty), mask=here)
        dg = d * u * slope
        du = d * gate
        tl.store(dz_ptr + wide, dg.to(dz_ptr.dtype.element_ty), mask=here)
        tl.store(dz_ptr + F + wide, du.to(dz_ptr.dtype.element_ty), mask=here)
        if sums_ptr is not None:
            total_g += dg
            total_u += du
    if sums_ptr is not None:
        own = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * F)
        tl.store(own + columns, tl.sum(total_g, 0), mask=inside)
        tl.store(own + F + columns, tl.sum(total_u, 0), mask=inside)


@triton.jit
def column_sums_kernel(
    x_ptr,  # [N, F]
    sums_ptr,  # [ranges, F] fp32
    N, F, rows_each,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    total = tl.zeros([R, BLOCK], tl.float32)
    for start in tl.range(first, last, R, num_stages=STAGES):
        rows = (start + tl.arange(0, R)).to(tl.int64)
        here = (rows < last)[:, None] & inside[None, :]
        at = rows[:, None] * F + columns[None, :]
        total += tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    own = sums_ptr + tl.program_id(0).to(tl.int64) * F
    tl.store(own + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def cast_kernel(
    weight_ptr, to_ptr,  # [n]
    bias_ptr, bias_to_ptr,  # [m]; may be None
    n, m,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last programs cast the bias."""
    program, of_weight = tl.program_id(0), tl.cdiv(n, BLOCK)
    lanes = tl.arange(0, BLOCK)
    if program < of_weight:
        at = program.to(tl.int64) * BLOCK + lanes
        x = tl.load(weight_ptr + at, mask=at < n, other=0.0)
        tl.store(to_ptr + at, x.to(to_ptr.dtype.element_ty), mask=at < n)
    elif bias_ptr is not None:
        at = (program - of_weight).to(tl.int64) * BLOCK + lanes
        x = tl.load(bias_ptr + at, mask=at < m, other=0.0)
        tl.store(bias_to_ptr + at, x.to(bias_to_ptr.dtype.element_ty), mask=at < m)


def gelu_backward(
    d: Tensor, z: Tensor, sums: bool, again: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """d [N, F] times gelu'(z), in place; all contiguous.

    Returns the sum of that over tokens [F] fp32 and gelu(z) [N, F], each [0] if not wished.
    """
    N, F = z.shape
    tile, ranges = _ranges(N, F, d.device, tile or pass_tile(d.device, sums=sums))
    a = torch.empty_like(z) if again else z.new_empty(0)
    partial = torch.empty((ranges if sums else 0, F), dtype=torch.float32, device=d.device)
    total = d.new_empty(F if sums else 0, dtype=torch.float32)
    with on_device(d):
        run(
            gelu_backward_kernel, (ranges, cdiv(F, tile.columns)),
            d, z, a if again else None, partial if sums else None, N, F, cdiv(N, ranges),
            R=tile.rows, BLOCK=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    if sums:
        add_up(partial, total)
    return total, a


def swiglu_backward(
    d: Tensor, z: Tensor, sums: bool, again: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of z [N, 2 F] where d [N, F] is that of swiglu(z); all contiguous.

    Then the sum of it over tokens [2 F] fp32 and swiglu(z) [N, F], each [0] if not wished.
    """
    N, F = d.shape
    tile, ranges = _ranges(N, F, d.device, tile or pass_tile(d.device, gated=True))
    dz = torch.empty_like(z)
    a = torch.empty_like(d) if again else d.new_empty(0)
    partial = torch.empty((ranges if sums else 0, 2 * F), dtype=torch.float32, device=d.device)
    total = d.new_empty(2 * F if sums else 0, dtype=torch.float32)
    with on_device(d):
        run(
            swiglu_backward_kernel, (ranges, cdiv(F, tile.columns)),
            d, z, dz, a if again else None, partial if sums else None, N, F,
            cdiv(N, ranges),
            R=tile.rows, BLOCK=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    if sums:
        add_up(partial, total)
    return dz, total, a


def column_sums(x: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """The sum over tokens [F] of x [N, F], contiguous."""
    N, F = x.shape
    tile, ranges = _ranges(N, F, x.device, tile)
    partial = torch.empty((ranges, F), dtype=torch.float32, device=x.device)
    total = x.new_empty(F, dtype=dtype)
    with on_device(x):
        run(
            column_sums_kernel, (ranges, cdiv(F, tile.columns)),
            x, partial, N, F, cdiv(N, ranges),
            R=tile.rows, BLOCK=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    add_up(partial, total)
    return total


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in dtype, in one launch; the bias [0] if there is none. Contiguous."""
    to = torch.empty_like(weight, dtype=dtype)
    bias_to = weight.new_empty(0 if bias is None else bias.numel(), dtype=dtype)
    block = cast_block(weight.device)
    n, m = weight.numel(), bias_to.numel()
    with on_device(weight):
        run(
            cast_kernel, (cdiv(n, block) + cdiv(m, block),),
            weight, to, bias, None if bias is None else bias_to, n, m, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return to, bias_to


def _ranges(N: int, F: int, device: torch.device, tile: Tile | None) -> tuple[Tile, int]:
    """The tile, and how many ranges of rows make about tile.programs programs a multiprocessor:
    all of them run at once, and none is left for a second turn."""
    tile = tile or pass_tile(device)
    across = cdiv(F, tile.columns)
    ranges = max(tile.programs * processors(device) // across, 1)
    return tile, min(ranges, cdiv(N, tile.rows))
