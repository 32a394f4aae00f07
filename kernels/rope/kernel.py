"""Rotary positions: heads turned where they lie, or from one tensor into another.

Dims: N = B x T tokens, H heads that are turned, D head size, R = 2 HALF rotated dims of a head.

    y_i = x_i cos_i - x_j sin_i      y_j = x_j cos_i + x_i sin_i      i < HALF, j = i + HALF

A program has a few tokens and heads; both numbers of a pair pass through one thread, which has
read them before it writes them, so y may be x. Backward is the same with -sin: the transpose, for
cos and sin may carry a factor (YaRN's), and then it is not the inverse.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device
from kernels.launch import run
from kernels.rope.tiles import Tile, tile_for
from kernels.sizes import cdiv, padded


@triton.jit
def rotate_kernel(
    x_ptr, y_ptr,  # [B, T, H or more, D]
    table_ptr,  # [T, R] or [B, T, R] fp32: cos, then sin
    N, T, H,
    x_batch, x_token, y_batch, y_token,  # strides
    table_batch,  # rows of the table between sequences: T, or 0 where they share it
    X_HEAD: tl.constexpr, Y_HEAD: tl.constexpr,  # strides
    HALF: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    batch, t = (n // T).to(tl.int64), (n % T).to(tl.int64)

    known = (n < N)[:, None] & (pairs < HALF)[None, :]
    here = known[:, None, :] & (heads < H)[None, :, None]
    start = batch * x_batch + t * x_token
    at = x_ptr + start[:, None, None] + (heads * X_HEAD)[None, :, None] + pairs[None, None, :]
    a = tl.load(at, mask=here, other=0.0).to(tl.float32)  # [TOKENS, HEADS, PAIRS]
    b = tl.load(at + HALF, mask=here, other=0.0).to(tl.float32)

    # after x, which is on its way while these pass through shared memory to all heads
    row = (batch * table_batch + t) * (2 * HALF)
    at = table_ptr + row[:, None] + pairs[None, :]
    cos = tl.load(at, mask=known, other=0.0)[:, None, :]  # [TOKENS, 1, PAIRS]
    sin = tl.load(at + HALF, mask=known, other=0.0)[:, None, :]
    if BACK:
        sin = -sin

    start = batch * y_batch + t * y_token
    at = y_ptr + start[:, None, None] + (heads * Y_HEAD)[None, :, None] + pairs[None, None, :]
    tl.store(at, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=here)
    tl.store(at + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=here)


def rotate(
    x: Tensor, y: Tensor, table: Tensor, heads: int, back: bool, tile: Tile | None = None
) -> None:
    """The first R dims of the first `heads` heads of x [B, T, .., D], turned, into those of y,
    which may be x; their last dimensions are contiguous. table [T, R] or [B, T, R] fp32."""
    B, T, half = x.shape[0], x.shape[1], table.shape[-1] // 2
    if min(B, T, heads, half) == 0:
        return
    table = table.contiguous()
    tile = tile or tile_for(heads, half, x.device)
    grid = (cdiv(B * T, tile.tokens), cdiv(heads, tile.heads))
    with on_device(x):
        run(
            rotate_kernel, grid,
            x, y, table, B * T, T, heads, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            T if table.dim() == 3 else 0, X_HEAD=x.stride(2), Y_HEAD=y.stride(2), HALF=half,
            BACK=back, TOKENS=tile.tokens, HEADS=tile.heads,
            PAIRS=padded(half), num_warps=tile.warps,
        )  # fmt: skip
