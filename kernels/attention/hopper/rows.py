"""The two small kernels around the backward: what it needs per query row, and dQ to its dtype.

Dims: B batch, T queries, H heads, D head size, BD = D padded as in the main kernel, BM queries of
its tiles, to which the buffers between the kernels are padded, BR rows of a program here.

With PDL each kernel starts while the one before it ends, and waits before it reads what that left.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(T, H, BM: tl.constexpr, BR: tl.constexpr):
    """(batch, head, rows, and where the program's rows stand in buffers padded to BM)."""
    n_tiles = tl.cdiv(T, BM) * (BM // BR)
    pid = tl.program_id(0)
    head = pid // n_tiles
    rows = (pid - head * n_tiles) * BR + tl.arange(0, BR)
    place = tl.cast(pid, tl.int64) * BR + tl.arange(0, BR)
    return tl.cast(head // H, tl.int64), tl.cast(head % H, tl.int64), rows, place


@triton.jit(do_not_specialize=["T", "H"])
def prepare_rows_kernel(
    out_ptr,  # [B, T, H, D] contiguous
    d_out_ptr,  # [B, T, H, D], strides below
    lse_ptr, d_lse_ptr,  # [B, H, T] contiguous; d_lse may be None
    stats_ptr,  # [2, B, H, T padded] fp32: lse in log2 units, -delta
    dq_ptr,  # [B, H, T padded, D] fp32: set to 0
    d_out_b, d_out_t, d_out_h, n_stats, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * d_out) - d_lse, all that the softmax's normalisation adds to dS."""
    if PDL:
        gdc_launch_dependents()
    b, h, rows, place = _tile(T, H, BM, BR)
    dims = tl.arange(0, BD)
    inside = rows < T
    within = inside[:, None]
    written = (place >= 0)[:, None]
    if BD > D:
        within = within & (dims < D)[None, :]
        written = written & (dims < D)[None, :]
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
    tl.store(dq_ptr + place[:, None] * D + dims[None, :], tl.zeros([BR, BD], tl.float32), written)


@triton.jit(do_not_specialize=["T", "H"])
def cast_dq_kernel(
    sum_ptr,  # [B, H, T padded, D] fp32
    dq_ptr,  # [B, T, H, D], strides below
    dq_b, dq_t, dq_h, scale, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum."""
    if PDL:
        gdc_wait()
    b, h, rows, place = _tile(T, H, BM, BR)
    dims = tl.arange(0, BD)
    within = (rows < T)[:, None]
    if BD > D:
        within = within & (dims < D)[None, :]
    value = tl.load(sum_ptr + place[:, None] * D + dims[None, :], within, other=0.0) * scale
    at = (b * dq_b + h * dq_h + rows * tl.cast(dq_t, tl.int64))[:, None] + dims[None, :]
    tl.store(dq_ptr + at, value.to(dq_ptr.dtype.element_ty), mask=within)
