"""The two small kernels around the backward: what it needs per query row, and dQ to its dtype.

Dims: B batch, T queries, H heads, D head size, BM queries of a tile; one program per tile.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(T, H, BM: tl.constexpr):
    """(batch, head, rows, and where the tile's rows stand in buffers padded to BM)."""
    n_tiles = tl.cdiv(T, BM)
    pid = tl.program_id(0)
    head = pid // n_tiles
    rows = (pid - head * n_tiles) * BM + tl.arange(0, BM)
    place = tl.cast(pid, tl.int64) * BM + tl.arange(0, BM)
    return tl.cast(head // H, tl.int64), tl.cast(head % H, tl.int64), rows, place


@triton.jit(do_not_specialize=["T", "H"])
def prepare_rows_kernel(
    out_ptr,  # [B, T, H, D] contiguous
    d_out_ptr,  # [B, T, H, D], strides below
    lse_ptr, d_lse_ptr,  # [B, H, T] contiguous; d_lse may be None
    stats_ptr,  # [2, B, H, T padded] fp32: lse in log2 units, -delta
    dq_ptr,  # [B, H, T padded, D] fp32: set to 0
    d_out_b, d_out_t, d_out_h, n_stats, T, H,
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * d_out) - d_lse, all that the softmax's normalisation adds to dS."""
    b, h, rows, place = _tile(T, H, BM)
    dims = tl.arange(0, D)
    inside = rows < T
    at = ((b * T + rows) * H + h)[:, None] * D + dims[None, :]
    out = tl.load(out_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = (b * d_out_b + h * d_out_h + rows * tl.cast(d_out_t, tl.int64))[:, None] + dims[None, :]
    d_out = tl.load(d_out_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    at = (b * H + h) * T + rows
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + at, mask=inside, other=0.0)
    # +inf past the end: P is 0 there
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf")) * LOG2_E
    tl.store(stats_ptr + place, lse)
    tl.store(stats_ptr + n_stats + place, -delta)
    tl.store(dq_ptr + place[:, None] * D + dims[None, :], tl.zeros([BM, D], tl.float32))


@triton.jit(do_not_specialize=["T", "H"])
def cast_dq_kernel(
    sum_ptr,  # [B, H, T padded, D] fp32
    dq_ptr,  # [B, T, H, D] contiguous
    scale, T, H,
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum."""
    b, h, rows, place = _tile(T, H, BM)
    dims = tl.arange(0, D)
    value = tl.load(sum_ptr + place[:, None] * D + dims[None, :]) * scale
    at = ((b * T + rows) * H + h)[:, None] * D + dims[None, :]
    tl.store(dq_ptr + at, value.to(dq_ptr.dtype.element_ty), mask=(rows < T)[:, None])
