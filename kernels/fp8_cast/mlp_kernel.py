"""What an MLP in fp8 has between its products, in Triton: activations cast as they are computed.

Dims: N tokens, F hidden features. z is [N, F], or gated [N, 2 F] = [g | u]; a = gelu(z) or silu(g)
u, [N, F]; d the gradient of a, dz that of z. Two passes, as for any tensor with one scale: the
largest number, then the cast. Neither a nor dz is ever in memory in 16 bits. Both passes compute
the same numbers in the same way, so the largest one of the first is the largest of the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device, processors
from kernels.fp8_cast import tiles
from kernels.fp8_cast.kernel import bits_of, factors
from kernels.fp8_cast.tiles import Tile, Walk
from kernels.launch import run
from kernels.linear.activations import gelu, silu
from kernels.norm.kernel import add_up
from kernels.sizes import cdiv


@triton.jit
def numbers(z_ptr, d_ptr, rows, columns, F, inside, GATED: tl.constexpr):
    """a twice where d_ptr is None; else dz, which if gated is dg and du. fp32."""
    at = rows[:, None] * F + columns[None, :]
    if GATED:
        wide = rows[:, None] * (2 * F) + columns[None, :]
        g = tl.load(z_ptr + wide, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(z_ptr + F + wide, mask=inside, other=0.0).to(tl.float32)
        gate, slope = silu(g)
        if d_ptr is None:
            first = gate * u
            second = first
        else:
            d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
            first = d * u * slope
            second = d * gate
    else:
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        first, slope = gelu(z)
        if d_ptr is not None:
            first = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
        second = first
    return first, second


@triton.jit
def maximum_kernel(
    z_ptr,  # [N, F] or [N, 2 F]
    d_ptr,  # [N, F]; None: of a, not of dz
    bits_ptr,  # 0-dim int32, zero before
    sums_ptr,  # [ranges, width of dz] fp32: of dz over a range of tokens; may be None
    N, F, rows_each,
    GATED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns a range of rows and BLOCK columns and walks down its rows, R at a time."""
    begin = tl.program_id(0) * rows_each
    end = tl.minimum(begin + rows_each, N)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    peak = tl.zeros([R, BLOCK], tl.int32)
    total = tl.zeros([R, BLOCK], tl.float32)
    total_second = tl.zeros([R, BLOCK], tl.float32)
    for start in tl.range(begin, end, R, num_stages=STAGES):
        rows = (start + tl.arange(0, R)).to(tl.int64)
        inside = (rows < end)[:, None] & (columns < F)[None, :]
        first, second = numbers(z_ptr, d_ptr, rows, columns, F, inside, GATED)
        peak = tl.maximum(peak, bits_of(first))
        if GATED:
            peak = tl.maximum(peak, bits_of(second))
        if sums_ptr is not None:
            total += first
            if GATED:
                total_second += second
    tl.atomic_max(bits_ptr, tl.max(tl.max(peak, 1), 0), sem="relaxed")
    if sums_ptr is not None:
        width = 2 * F if GATED else F
        own = sums_ptr + tl.program_id(0).to(tl.int64) * width + columns
        tl.store(own, tl.sum(total, 0), mask=columns < F)
        if GATED:
            tl.store(own + F, tl.sum(total_second, 0), mask=columns < F)


@triton.jit
def cast_kernel(
    z_ptr,  # [N, F] or [N, 2 F]
    d_ptr,  # [N, F]; None: a is cast, not dz
    maximum_ptr,  # 0-dim fp32
    q_ptr, qt_ptr,  # [N, width] and [width, N] fp8; qt may be None
    scale_ptr,  # 0-dim fp32
    N, F,
    TOP: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # from the last tile to the first: what was read last for the maximum is still in L2
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(F, BK)
    rows = (tile // across * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (tile % across * BK + tl.arange(0, BK)).to(tl.int64)
    inside = (rows[:, None] < N) & (columns[None, :] < F)
    factor, scale = factors(tl.load(maximum_ptr).to(tl.int32, bitcast=True), TOP)
    first, second = numbers(z_ptr, d_ptr, rows, columns, F, inside, GATED)
    pair: tl.constexpr = GATED and d_ptr is not None
    width = 2 * F if pair else F
    put(first, factor, q_ptr, qt_ptr, rows, columns, inside, N, width)
    if pair:
        put(second, factor, q_ptr, qt_ptr, rows, columns + F, inside, N, width)
    if tile == 0:
        tl.store(scale_ptr, scale)


@triton.jit
def put(x, factor, q_ptr, qt_ptr, rows, columns, inside, N, width):
    """x [BM, BK] as fp8, as it lies and transposed."""
    q = (x * factor).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + rows[:, None] * width + columns[None, :], q, mask=inside)
    if qt_ptr is not None:
        tl.store(qt_ptr + columns[:, None] * N + rows[None, :], tl.trans(q), mask=tl.trans(inside))


def maximum(
    z: Tensor, d: Tensor | None, gated: bool, sums: bool = False, walk: Walk | None = None
) -> tuple[Tensor, Tensor]:
    """The largest |a|, or |dz| if d is given, 0-dim fp32; the sum of dz over tokens, fp32, [0] if
    not wished. All contiguous."""
    N, width = z.shape
    F = width // 2 if gated else width
    walk = walk or tiles.choose(z.device).hidden_maximum
    across = cdiv(F, walk.columns)
    ranges = min(max(walk.programs * processors(z.device) // across, 1), cdiv(N, walk.rows))
    bits = torch.zeros((), dtype=torch.int32, device=z.device)
    partial = torch.empty((ranges if sums else 0, width), dtype=torch.float32, device=z.device)
    total = partial.new_empty(width if sums else 0)
    with on_device(z):
        run(
            maximum_kernel, (ranges, across),
            z, d, bits, partial if sums else None, N, F, cdiv(N, ranges),
            GATED=gated, R=walk.rows, BLOCK=walk.columns, STAGES=walk.stages, num_warps=walk.warps,
        )  # fmt: skip
    if sums:
        add_up(partial, total)
    return bits.view(torch.float32), total


def cast(
    z: Tensor, d: Tensor | None, maximum: Tensor, q: Tensor, qt: Tensor | None, scale: Tensor,
    gated: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """a, or dz if d is given, into q, its transpose into qt if that is there, and scale, 0-dim."""
    N, width = z.shape
    F = width // 2 if gated else width
    chosen = tiles.choose(z.device)
    tile = tile or (chosen.gated if gated else chosen.hidden)
    with on_device(z):
        run(
            cast_kernel, (cdiv(N, tile.rows) * cdiv(F, tile.columns),),
            z, d, maximum, q, qt, scale, N, F,
            TOP=torch.finfo(q.dtype).max, GATED=gated, BM=tile.rows, BK=tile.columns,
            num_warps=tile.warps,
        )  # fmt: skip
