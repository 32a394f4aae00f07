"""What an MLP in fp8 has between its products, in Triton: activations cast as they are computed.

Dims: N tokens, F hidden features. z is [N, F], or gated [N, 2 F] = [g | u]; a = gelu(z) or silu(g)
u, [N, F]; d the gradient of a, dz that of z. Neither a nor dz is ever in memory but as fp8.

Before they are cast both are rounded to z's 16 bits, as if they had been: 16-bit numbers may move
to other threads, fp8 ones may not (ONE_PASS in kernel.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device, processors
from kernels.fp8_cast import tiles
from kernels.fp8_cast.kernel import ONE_PASS, bits_of, factors, put
from kernels.fp8_cast.tiles import Tile, Walk
from kernels.launch import run
from kernels.linear.activations import gelu, silu
from kernels.norm.kernel import add_up
from kernels.sizes import cdiv


@triton.jit
def activated(z_ptr, rows, columns, F, inside, GATED: tl.constexpr):
    """a and its derivative by z; gated: by g and by u. fp32."""
    if GATED:
        at = rows[:, None] * (2 * F) + columns[None, :]
        g = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(z_ptr + F + at, mask=inside, other=0.0).to(tl.float32)
        by_u, slope = silu(g)
        a = by_u * u
        first = slope * u
        second = by_u
    else:
        at = rows[:, None] * F + columns[None, :]
        a, first = gelu(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32))
        second = first
    return a, first, second


@triton.jit
def gated_maxima_kernel(
    z_ptr,  # [N, 2 F]
    bits_ptr,  # [2] int32, zeros before: of |a| and of its derivatives
    N, F, rows_each,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns a range of rows and BLOCK columns and walks down its rows, R at a time."""
    begin = tl.program_id(0) * rows_each
    end = tl.minimum(begin + rows_each, N)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    peak = tl.zeros([R, BLOCK], tl.int32)
    steepest = tl.zeros([R, BLOCK], tl.int32)
    for start in tl.range(begin, end, R, num_stages=STAGES):
        rows = (start + tl.arange(0, R)).to(tl.int64)
        inside = (rows < end)[:, None] & (columns < F)[None, :]
        a, by_g, by_u = activated(z_ptr, rows, columns, F, inside, True)
        peak = tl.maximum(peak, bits_of(a.to(z_ptr.dtype.element_ty).to(tl.float32)))
        steepest = tl.maximum(steepest, tl.maximum(bits_of(by_g), bits_of(by_u)))
    tl.atomic_max(bits_ptr, tl.max(tl.max(peak, 1), 0), sem="relaxed")
    tl.atomic_max(bits_ptr + 1, tl.max(tl.max(steepest, 1), 0), sem="relaxed")


@triton.jit
def cast_kernel(
    z_ptr,  # [N, F] or [N, 2 F]
    d_ptr,  # [N, F]; None: a is cast, not dz
    maximum_ptr,  # 0-dim fp32
    q_ptr, qt_ptr,  # [N, width] and [width, N] fp8; one may be None
    scale_ptr,  # 0-dim fp32
    sums_ptr,  # [tiles down, width] fp32: of dz over a tile's tokens; may be None
    N, F,
    TOP: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # from the last tile to the first: what was read last for the maximum is still in L2
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(F, BK)
    down = tile // across
    rows = (down * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (tile % across * BK + tl.arange(0, BK)).to(tl.int64)
    inside = (rows[:, None] < N) & (columns[None, :] < F)
    factor, scale = factors(tl.load(maximum_ptr).to(tl.int32, bitcast=True), TOP)
    a, first, second = activated(z_ptr, rows, columns, F, inside, GATED)
    pair: tl.constexpr = GATED and d_ptr is not None
    width = 2 * F if pair else F
    if d_ptr is not None:
        at = rows[:, None] * F + columns[None, :]
        d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
        a = d * first
    put(a.to(z_ptr.dtype.element_ty), factor, q_ptr, qt_ptr, rows, columns, inside, N, width)
    if sums_ptr is not None:
        own = sums_ptr + down.to(tl.int64) * width + columns
        tl.store(own, tl.sum(a, 0), mask=columns < F)
    if pair:
        a = d * second
        put(
            a.to(z_ptr.dtype.element_ty), factor, q_ptr, qt_ptr, rows, columns + F, inside, N, width
        )
        if sums_ptr is not None:
            tl.store(own + F, tl.sum(a, 0), mask=columns < F)
    if tile == 0:
        tl.store(scale_ptr, scale)


def gated_maxima(z: Tensor, walk: Walk | None = None) -> Tensor:
    """[2] fp32: the largest |a|, and the largest derivative of a; z [N, 2 F] contiguous."""
    N, F = z.shape[0], z.shape[1] // 2
    walk = walk or tiles.choose(z.device).gated_maxima
    across = cdiv(F, walk.columns)
    ranges = min(max(walk.programs * processors(z.device) // across, 1), cdiv(N, walk.rows))
    bits = torch.zeros(2, dtype=torch.int32, device=z.device)
    with on_device(z):
        run(
            gated_maxima_kernel, (ranges, across), z, bits, N, F, cdiv(N, ranges),
            R=walk.rows, BLOCK=walk.columns, STAGES=walk.stages, num_warps=walk.warps,
        )  # fmt: skip
    return bits.view(torch.float32)


def cast(
    z: Tensor, d: Tensor | None, maximum: Tensor, q: Tensor | None, qt: Tensor | None,
    scale: Tensor, sums: Tensor | None, gated: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """a, or dz if d is given, into those of q and, transposed, qt that are there, and scale, 0-dim;
    the sum of dz over tokens into `sums` [width] fp32, if that is there. All contiguous."""
    if q is not None and qt is not None and not ONE_PASS:
        cast(z, d, maximum, q, None, scale, sums, gated, tile)
        cast(z, d, maximum, None, qt, scale, None, gated, tile)
        return
    either = q if q is not None else qt
    assert either is not None
    N, F = z.shape[0], z.shape[1] // (2 if gated else 1)
    chosen = tiles.choose(z.device)
    hidden = chosen.hidden if sums is None else chosen.hidden_summed
    tile = tile or (chosen.gated if gated else hidden)
    down = cdiv(N, tile.rows)
    partial = None
    if sums is not None:
        partial = torch.empty((down, z.shape[1]), dtype=torch.float32, device=z.device)
    with on_device(z):
        run(
            cast_kernel, (down * cdiv(F, tile.columns),),
            z, d, maximum, q, qt, scale, partial, N, F,
            TOP=torch.finfo(either.dtype).max, GATED=gated, BM=tile.rows, BK=tile.columns,
            num_warps=tile.warps,
        )  # fmt: skip
    if partial is not None:
        assert sums is not None
        add_up(partial, sums)
