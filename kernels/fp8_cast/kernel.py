"""The casts in Triton. Dims: x [M, K] contiguous fp32 or 16-bit; q as x; qt [K, M]. See reference.

The largest absolute value is found among bit patterns: those of positive floats are ordered as the
floats are, with infinity above all numbers and NaN above infinity, so integers carry both through
reductions that would drop a NaN, and an integer maximum in memory does not depend on the order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device
from kernels.fp8_cast import tiles
from kernels.fp8_cast.reference import FLOOR
from kernels.fp8_cast.tiles import Tile
from kernels.launch import run
from kernels.norm.kernel import add_up
from kernels.sizes import cdiv, padded

LEAST = tl.constexpr(FLOOR)
# Where a kernel stores fp8 numbers as they lie and, moved to other threads, transposed, ptxas 12.9
# writes bytes that are none of them; Triton brings it to 3.8 at least (triton-lang/triton#11111). A
# kernel with one of the stores is right, and so is one whose 16-bit numbers move before they are
# cast, which is what Triton 3.6 makes of these kernels (tests on an H200) and 3.7 does not.
ONE_PASS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@triton.jit
def bits_of(x):
    """|x| as an integer of the same order."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def factors(bits, TOP: tl.constexpr):
    """(top / A, A / top) of A by its bits."""
    maximum = bits.to(tl.float32, bitcast=True)
    maximum = tl.where(maximum < LEAST, LEAST, maximum)  # which lets NaN pass
    top = tl.full(maximum.shape, TOP, tl.float32)
    return tl.div_rn(top, maximum), tl.div_rn(maximum, top)


@triton.jit
def put(x, factor, q_ptr, qt_ptr, rows, columns, inside, N, width):
    """x [BM, BK] of 16 bits as fp8, as it lies and transposed; q or qt may be None."""
    x = x.to(tl.float32) * factor
    if q_ptr is not None:
        at = rows[:, None] * width + columns[None, :]
        tl.store(q_ptr + at, x.to(q_ptr.dtype.element_ty), mask=inside)
    if qt_ptr is not None:
        at = columns[:, None] * N + rows[None, :]
        tl.store(qt_ptr + at, tl.trans(x.to(qt_ptr.dtype.element_ty)), mask=tl.trans(inside))


@triton.jit
def maximum_kernel(
    x_ptr,  # [n]
    bits_ptr,  # 0-dim int32, zero before
    n,
    POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """POSITIVE: of the positive numbers, and NaN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    if POSITIVE:
        x = tl.where(x < 0.0, 0.0, x)
    tl.atomic_max(bits_ptr, tl.max(bits_of(x), 0), sem="relaxed")


@triton.jit
def tensorwise_kernel(
    x_ptr,  # [M, K]
    maximum_ptr,  # 0-dim fp32
    q_ptr, qt_ptr,  # [M, K] and [K, M] fp8
    scale_ptr,  # 0-dim fp32
    sums_ptr,  # [tiles down, K] fp32: of x over a tile's rows; may be None
    M, K,
    TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # from the last tile to the first: what was read last for the maximum is still in L2
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(K, BK)
    rows = tile // across * BM + tl.arange(0, BM)
    columns = tile % across * BK + tl.arange(0, BK)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    at = rows[:, None].to(tl.int64) * K + columns[None, :]
    bits = tl.load(maximum_ptr).to(tl.int32, bitcast=True)
    factor, scale = factors(bits, TOP)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    q = (x * factor).to(q_ptr.dtype.element_ty)
    if sums_ptr is not None:
        down = (tile // across).to(tl.int64)
        tl.store(sums_ptr + down * K + columns, tl.sum(x, 0), mask=columns < K)
    if ROWS:
        tl.store(q_ptr + at, q, mask=inside)
    if COLUMNS:
        turned = columns[:, None].to(tl.int64) * M + rows[None, :]
        inside = (columns[:, None] < K) & (rows[None, :] < M)
        if x_ptr.dtype.element_ty == tl.float32:
            # read again, from L1, as it is to be written: fp32 numbers would be cast before they
            # move (ONE_PASS; 4 of 10 were wrong on an H200)
            at = rows[None, :].to(tl.int64) * K + columns[:, None]
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            qt = (x * factor).to(qt_ptr.dtype.element_ty)
        else:
            qt = tl.trans(q)
        tl.store(qt_ptr + turned, qt, mask=inside)
    if tile == 0:
        tl.store(scale_ptr, scale)


@triton.jit
def rowwise_kernel(
    x_ptr, q_ptr,  # [M, K]
    scale_ptr,  # [M] fp32
    K,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * K + columns
    x = tl.load(x_ptr + at, mask=columns < K, other=0.0).to(tl.float32)
    factor, scale = factors(tl.max(bits_of(x), 0), TOP)
    tl.store(q_ptr + at, (x * factor).to(q_ptr.dtype.element_ty), mask=columns < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def columnwise_kernel(
    x_ptr,  # [M, K]
    qt_ptr,  # [K, M]
    scale_ptr,  # [K] fp32
    M, K,
    TOP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    lanes = tl.arange(0, BM)
    peak = tl.zeros([BM, BK], tl.int32)
    for start in tl.range(0, M, BM):
        rows = start + lanes
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        at = rows[:, None].to(tl.int64) * K + columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, bits_of(x))
    factor, scale = factors(tl.max(peak, 0), TOP)
    tl.store(scale_ptr + columns, scale, mask=columns < K)
    for start in tl.range(0, M, BM):
        rows = start + lanes
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        at = rows[:, None].to(tl.int64) * K + columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        q = (x * factor[None, :]).to(qt_ptr.dtype.element_ty)
        turned = columns[:, None].to(tl.int64) * M + rows[None, :]
        inside = (columns[:, None] < K) & (rows[None, :] < M)
        tl.store(qt_ptr + turned, tl.trans(q), mask=inside)


def absolute_maximum(x: Tensor, positive: bool = False, block: int | None = None) -> Tensor:
    """As reference.absolute_maximum, or of the numbers above 0 only; x contiguous."""
    block = block or tiles.choose(x.device).maximum
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    with on_device(x):
        grid = (cdiv(x.numel(), block),)
        run(
            maximum_kernel, grid, x, bits, x.numel(),
            POSITIVE=positive, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return bits.view(torch.float32)


def tensorwise(
    x: Tensor,
    maximum: Tensor,
    q: Tensor | None,
    qt: Tensor | None,
    scale: Tensor,
    sums: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """x [M, K] contiguous into those of q [M, K] and qt [K, M] that are there, and scale, 0-dim;
    its sum over the rows into `sums` [K] fp32, if that is there."""
    if q is not None and qt is not None and not ONE_PASS:
        tensorwise(x, maximum, q, None, scale, sums, tile)
        tensorwise(x, maximum, None, qt, scale, None, tile)
        return
    M, K = x.shape
    chosen = tiles.choose(x.device)
    tile = tile or (chosen.tensorwise if sums is None else chosen.summed)
    either = q if q is not None else qt
    assert either is not None
    down, partial = cdiv(M, tile.rows), None
    if sums is not None:
        partial = torch.empty((down, K), dtype=torch.float32, device=x.device)
    with on_device(x):
        run(
            tensorwise_kernel, (down * cdiv(K, tile.columns),),
            x, maximum, either if q is None else q, either if qt is None else qt, scale, partial,
            M, K,
            TOP=torch.finfo(either.dtype).max, ROWS=q is not None, COLUMNS=qt is not None,
            BM=tile.rows, BK=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    if partial is not None:
        assert sums is not None
        add_up(partial, sums)


def rowwise(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """x [M, K] contiguous, K <= ROW_LIMIT, into q [M, K] and scale [M, 1]."""
    M, K = x.shape
    block = padded(K)
    with on_device(x):
        run(
            rowwise_kernel, (M,),
            x, q, scale, K,
            TOP=torch.finfo(q.dtype).max, BLOCK=block, num_warps=tiles.row_warps(block),
        )  # fmt: skip


def columnwise(x: Tensor, qt: Tensor, scale: Tensor, tile: Tile | None = None) -> None:
    """x [M, K] contiguous into qt [K, M] and scale [K, 1]."""
    M, K = x.shape
    tile = tile or tiles.choose(x.device).columnwise
    with on_device(x):
        run(
            columnwise_kernel, (cdiv(K, tile.columns),),
            x, qt, scale, M, K,
            TOP=torch.finfo(qt.dtype).max, BM=tile.rows, BK=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
