"""The two small kernels around the backward: what it needs per query row, and dQ to its dtype.

Dims: B batch, T queries, H heads, D head size, BD = D padded as in the main kernel, BM queries of
its tiles, to which the buffers between the kernels are padded; a program here has ROWS rows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

import triton
import triton.language as tl

ROWS = tl.constexpr(64)  # as many as a consumer of the main kernel adds up in dq.py's order
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(T, H, BM: tl.constexpr):
    """(batch, head, rows of the program, rows of a head in buffers padded to BM)."""
    n_tiles = tl.cdiv(T, BM) * (BM // ROWS)
    pid = tl.program_id(0)
    head = pid // n_tiles
    rows = (pid - head * n_tiles) * ROWS + tl.arange(0, ROWS)
    return tl.cast(head // H, tl.int64), tl.cast(head % H, tl.int64), rows, n_tiles * ROWS


@triton.jit(do_not_specialize=["T", "H"])
def prepare_rows_kernel(
    out_ptr,  # [B, T, H, D] contiguous
    d_out_ptr,  # [B, T, H, D], strides below
    lse_ptr, d_lse_ptr,  # [B, H, T] contiguous; d_lse may be None
    stats_ptr,  # [2, B, H, T padded] fp32: lse in log2 units, -delta
    sum_ptr,  # [B, H, T padded, BD] fp32: set to 0
    d_out_b, d_out_t, d_out_h, n_stats, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * d_out) - d_lse, all that the softmax's normalisation adds to dS."""
    b, h, rows, padded = _tile(T, H, BM)
    place = (b * H + h) * padded + rows
    dims = tl.arange(0, BD)
    inside = rows < T
    within = inside[:, None]
    if BD > D:
        within = within & (dims < D)[None, :]
    at = ((b * T + rows) * H + h)[:, None] * D + dims[None, :]
    out = tl.load(out_ptr + at, mask=within, other=0.0).to(tl.float32)
    at = (b * d_out_b + h * d_out_h + rows * tl.cast(d_out_t, tl.int64))[:, None] + dims[None, :]
    d_out = tl.load(d_out_ptr + at, mask=within, other=0.0).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    at = (b * H + h) * T + rows
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + at, mask=inside, other=0.0)
    # +inf past the end: P is 0 there
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf")) * LOG2_E
    tl.store(stats_ptr + place, lse)
    tl.store(stats_ptr + n_stats + place, -delta)
    tl.store(sum_ptr + place[:, None] * BD + dims[None, :], tl.zeros([ROWS, BD], tl.float32))


@triton.jit(do_not_specialize=["T", "H"])
def cast_dq_kernel(
    sum_ptr,  # [B, H, T padded, BD] fp32, blocks of ROWS rows in the order of dq.py
    dq_ptr,  # [B, T, H, D], strides below
    dq_b, dq_t, dq_h, scale, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    HELD: tl.constexpr,  # columns that a consumer of the main kernel adds up
):  # fmt: skip
    """dq = scale * sum."""
    b, h, rows, padded = _tile(T, H, BM)
    place = (b * H + h) * padded + tl.min(rows, 0)
    dims = tl.arange(0, BD)
    within = (rows < T)[:, None]
    if BD > D:
        within = within & (dims < D)[None, :]
    value = tl.load(sum_ptr + place * BD + tl.arange(0, ROWS * BD))
    # part, 8 columns, warp, row, lane of 4, 8 rows, column
    value = value.reshape([BD // HELD, HELD // 8, 4, 8, 4, 2, 2])
    value = value.permute((2, 5, 3, 0, 1, 4, 6)).reshape([ROWS, BD]) * scale
    at = (b * dq_b + h * dq_h + rows * tl.cast(dq_t, tl.int64))[:, None] + dims[None, :]
    tl.store(dq_ptr + at, value.to(dq_ptr.dtype.element_ty), mask=within)
