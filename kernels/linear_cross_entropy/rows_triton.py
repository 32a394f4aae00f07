"""The rows of a chunk in Triton: a program takes row after row and walks its columns, once or
twice.

Dims: n rows of the chunk, V words of this shard. With x the (capped) logits of a row, and t the
value of tanh:

    lse = log sum exp(x)        dx = exp(x - lse) (1 + 2 z lse) - [column is the label]
    dlogits = dx (1 - t^2)

Maxima and sums are those of groups of neighbours, which one thread holds, until the end of the row:
no block of columns waits for all threads.

The second walk finds the row in L2 while all rows in flight together fit there: so there are no
more programs than that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device, processors
from kernels.launch import run
from kernels.linear_cross_entropy.problem import Terms
from kernels.linear_cross_entropy.tiles import Tile, choose
from kernels.sizes import cdiv

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)  # no infinity, whose difference to itself is no number
GROUP = tl.constexpr(8)  # neighbours, 16 bytes of bf16: a thread has them all
SCALE_BLOCK = 4096  # numbers of a program of the scaling kernel


@triton.jit
def load_scores(
    row_ptr, cols, V, stride, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr
):
    """x in log2 units and tanh's value; -inf beyond the last word. KEEP: will be read again."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if MASKED:
        # to the end of the padding, which is aligned: a mask that ends anywhere splits wide loads
        y = tl.load(row_ptr + cols, mask=cols < stride, other=0.0, eviction_policy=policy)
        y = tl.where(cols < V, y.to(tl.float32), 0.0)
    else:
        y = tl.load(row_ptr + cols, eviction_policy=policy).to(tl.float32)
    bent = y
    if SOFTCAP:
        # through exp2, because libdevice has no interpreter; exact at both ends
        bent = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2_E / cap)) + 1.0)
        x = (cap * LOG2_E) * bent
    else:
        x = y * LOG2_E
    if MASKED:
        x = tl.where(cols < V, x, float("-inf"))
    return x, bent


@triton.jit
def add_block(
    peak, total, row_ptr, cols, V, stride, cap,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The running maximum and the sum of 2^(x - peak), both for each GROUP, a block later."""
    x, _ = load_scores(row_ptr, cols, V, stride, cap, SOFTCAP, MASKED, KEEP)
    new_peak = tl.maximum(peak, tl.max(x, 1))
    total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(x - new_peak[:, None]), 1)
    return new_peak, total


@triton.jit
def write_gradient(
    row_ptr, cols, V, stride, cap, level, factor, local,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dlogits over the logits; level is lse in log2 units, factor 1 + 2 z lse."""
    x, bent = load_scores(row_ptr, cols, V, stride, cap, SOFTCAP, MASKED, False)
    grad = tl.exp2(x - level) * factor
    grad = tl.where(cols == local, grad - 1.0, grad)
    if SOFTCAP:
        grad = grad * (1.0 - bent * bent)
    grad = grad.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, grad, mask=cols < stride)
    else:
        tl.store(row_ptr + cols, grad)


@triton.jit
def cross_entropy_rows_kernel(
    logits_ptr,  # [n, V], becomes dlogits with DIFFERENTIATE; rows `stride` apart, padding between
    labels_ptr,  # [n] integers
    lse_ptr, target_ptr,  # [n] fp32: written with MEASURE, else lse is read
    n, stride, V, first_word, ignore_index, cap, z_loss,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, SOFTCAP: tl.constexpr,
    MEASURE: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    whole = V // BLOCK * BLOCK  # the columns after these need a mask
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        row_ptr = logits_ptr + (row + tl.zeros([], tl.int64)) * stride
        label = tl.load(labels_ptr + row).to(tl.int64)
        local = label - first_word
        if label == ignore_index:
            if MEASURE:
                tl.store(lse_ptr + row, 0.0)
                tl.store(target_ptr + row, 0.0)
            if DIFFERENTIATE:
                zeros = tl.zeros([BLOCK // GROUP, GROUP], logits_ptr.dtype.element_ty)
                for start in tl.range(0, whole, BLOCK):
                    tl.store(row_ptr + start + lanes, zeros)
                tl.store(row_ptr + whole + lanes, zeros, mask=whole + lanes < stride)
        else:
            if MEASURE:
                here = (local >= 0) & (local < V)
                target = tl.load(row_ptr + local, mask=here, other=0.0).to(tl.float32)
                if SOFTCAP:
                    target = cap * (1.0 - 2.0 / (tl.exp2(target * (2.0 * LOG2_E / cap)) + 1.0))
                tl.store(target_ptr + row, target)
                peak = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
                total = tl.zeros([BLOCK // GROUP], tl.float32)
                for start in tl.range(0, whole, BLOCK, loop_unroll_factor=UNROLL):
                    peak, total = add_block(
                        peak, total, row_ptr, start + lanes, V, stride, cap,
                        SOFTCAP, False, DIFFERENTIATE,
                    )  # fmt: skip
                if whole < V:
                    peak, total = add_block(
                        peak, total, row_ptr, whole + lanes, V, stride, cap,
                        SOFTCAP, True, DIFFERENTIATE,
                    )  # fmt: skip
                highest = tl.max(peak, 0)
                level = highest + tl.log2(tl.sum(total * tl.exp2(peak - highest), 0))
                tl.store(lse_ptr + row, level * LN_2)
            else:
                level = tl.load(lse_ptr + row) * LOG2_E
            if DIFFERENTIATE:
                factor = 1.0 + 2.0 * z_loss * level * LN_2
                for start in tl.range(0, whole, BLOCK, loop_unroll_factor=UNROLL):
                    write_gradient(
                        row_ptr, start + lanes, V, stride, cap, level, factor, local, SOFTCAP, False
                    )
                if whole < V:
                    write_gradient(
                        row_ptr, whole + lanes, V, stride, cap, level, factor, local, SOFTCAP, True
                    )


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor_ptr, n, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr):
    """out = factor x; in place nothing is touched where factor is 1."""
    factor = tl.load(factor_ptr)
    if (factor != 1.0) | (not IN_PLACE):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < n)


def measure(logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms) -> None:
    """As rows_torch.measure."""
    launch(logits, labels, statistics, terms, measures=True, differentiates=False)


def differentiate(logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms) -> None:
    """As rows_torch.differentiate."""
    launch(logits, labels, statistics, terms, measures=False, differentiates=True)


def measure_and_differentiate(
    logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms
) -> None:
    """As rows_torch.measure_and_differentiate, in one kernel."""
    launch(logits, labels, statistics, terms, measures=True, differentiates=True)


def scale_into(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As rows_torch.scale_into."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    grid = (cdiv(x.numel(), SCALE_BLOCK),)
    if x.numel():
        with on_device(x):
            run(
                scale_kernel, grid,
                x, out, factor, x.numel(), BLOCK=SCALE_BLOCK, IN_PLACE=x.dtype == dtype,
            )  # fmt: skip
    return out


def launch(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    terms: Terms,
    *,
    measures: bool,
    differentiates: bool,
    tile: Tile | None = None,
) -> None:
    """logits [n, V] with rows stride(0) apart, of which the padding may be overwritten; labels [n]
    contiguous; statistics [2, n] fp32, rows contiguous."""
    tile = tile or choose(logits.device, logits.dtype)
    programs = logits.size(0)
    if tile.programs:
        programs = min(programs, tile.programs * processors(logits.device))
    with on_device(logits):
        run(
            cross_entropy_rows_kernel, (programs,),
            logits, labels, statistics[0], statistics[1],
            logits.size(0), logits.stride(0), logits.size(1), terms.first_word, terms.ignore_index,
            terms.softcap, terms.z_loss,
            BLOCK=tile.block, UNROLL=tile.unroll, SOFTCAP=terms.softcap > 0,
            MEASURE=measures, DIFFERENTIATE=differentiates, num_warps=tile.warps,
        )  # fmt: skip
