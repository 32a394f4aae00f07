"""The rows of a chunk in Triton: a program takes row after row and walks its columns, once or
twice.

Dims: n rows of the chunk, V words of this shard. With x the (capped) logits of a row, and t the
value of tanh:

    lse = log sum exp(x)        dx = exp(x - lse) (1 + 2 z lse) - [column is the label]
    dlogits = dx (1 - t^2)

Maxima and sums are those of groups of neighbours, which one thread holds, until the end of the row:
no block of columns waits for all threads.

The second walk finds the row in L2 while all rows in flight together fit there: so there are no
more programs than that. Rows kept in shared memory (Gluon, the next row loading behind the
gradients) or in registers, which are read once, were hardly faster: README.md.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows while the kernel is compiled)

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
# No infinity, whose difference to itself is no number; and a power of two, so that the fused
# `peak * LOG2_E - scaled` is exactly 0 for it (of 1e38 it keeps a rounding of 1e30: NaN on an H200)
LOWEST = tl.constexpr(-(2.0**126))
GROUP = tl.constexpr(8)  # neighbours, 16 bytes of bf16: a thread has them all
SCALE_BLOCK = 4096  # numbers of a program of the scaling kernel


@triton.jit
def bend(y, cap, SOFTCAP: tl.constexpr):
    """x and `bent` of y."""
    bent = y
    if SOFTCAP:
        # through exp2, because libdevice has no interpreter; exact at both ends
        bent = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2_E / cap)) + 1.0)
        y = cap * bent
    return y, bent


@triton.jit
def add_scores(peak, total, x):
    """The running maximum and the sum of e^(x - peak), both for each group, with a block more."""
    higher = tl.maximum(peak, tl.max(x, 1))
    scaled = higher * LOG2_E  # so that an exponent is one multiply-add
    total = total * tl.exp2(peak * LOG2_E - scaled)
    return higher, total + tl.sum(tl.exp2(x * LOG2_E - scaled[:, None]), 1)


@triton.jit
def whole_level(peak, total):
    """`level` of a row from its groups' maxima and sums."""
    highest = tl.max(peak, 0) * LOG2_E
    return highest + tl.log2(tl.sum(total * tl.exp2(peak * LOG2_E - highest), 0))


@triton.jit
def gradients(y, cap, level, factor, here, SOFTCAP: tl.constexpr):
    """dlogits of y; `here`: 1 for the label's column, which is written on its own, behind a
    barrier: comparing every column to it would be two more instructions of ten."""
    x, bent = bend(y, cap, SOFTCAP)
    grad = tl.exp2(x * LOG2_E - level) * factor - here
    if SOFTCAP:
        grad = grad * (1.0 - bent * bent)
    return grad


@triton.jit
def load_block(row_ptr, cols, stride, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Logits of a block, 0 beyond the padding. KEEP: will be read again."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if MASKED:
        # to the end of the padding, which is aligned: a mask that ends anywhere splits wide loads
        return tl.load(row_ptr + cols, mask=cols < stride, other=0.0, eviction_policy=policy)
    return tl.load(row_ptr + cols, eviction_policy=policy)


@triton.jit
def load_batch(row_ptr, cols, stride, BLOCK: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr):
    """COUNT blocks, all on their way before the first is needed."""
    blocks = ()
    for i in tl.static_range(COUNT):
        blocks += (load_block(row_ptr, cols + i * BLOCK, stride, False, KEEP),)
    return blocks


@triton.jit
def add_block(peak, total, block, cols, V, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """The running maximum and sum, both for each group, a block later."""
    x, _ = bend(block.to(tl.float32), cap, SOFTCAP)
    if MASKED:
        x = tl.where(cols < V, x, float("-inf"))  # the padding may hold anything
    return add_scores(peak, total, x)


@triton.jit
def cross_entropy_rows_kernel(
    logits_ptr,  # [n, V], becomes dlogits with DIFFERENTIATE; rows `stride` apart, padding between
    labels_ptr,  # [n] integers
    lse_ptr, target_ptr,  # [n] fp32: written with MEASURE, else lse is read
    n, stride, V, first_word, ignore_index, cap, z_loss,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, SOFTCAP: tl.constexpr,
    MEASURE: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    whole = V // BLOCK * BLOCK  # the columns after these need a mask
    batches = whole
    if UNROLL > 1:  # else the compiler does not see that no block is left over
        batches = V // (BLOCK * UNROLL) * (BLOCK * UNROLL)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        row_ptr = logits_ptr + (row + tl.zeros([], tl.int64)) * stride
        label = tl.load(labels_ptr + row).to(tl.int64)
        local = label - first_word
        if label == ignore_index:
            if MEASURE:
                tl.store(lse_ptr + row, 0.0)
                tl.store(target_ptr + row, 0.0)
            if DIFFERENTIATE:
                zeros = tl.zeros([BLOCK // GROUP, GROUP], ELEMENT)
                for start in tl.range(0, whole, BLOCK):
                    tl.store(row_ptr + start + lanes, zeros)
                tl.store(row_ptr + whole + lanes, zeros, mask=whole + lanes < stride)
        else:
            here = (local >= 0) & (local < V)
            target = tl.load(row_ptr + local, mask=here, other=0.0).to(tl.float32)
            if MEASURE:
                peak = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
                total = tl.zeros([BLOCK // GROUP], tl.float32)
                for start in tl.range(0, batches, BLOCK * UNROLL):
                    blocks = load_batch(
                        row_ptr, start + lanes, stride, BLOCK, UNROLL, DIFFERENTIATE
                    )
                    for i in tl.static_range(UNROLL):
                        peak, total = add_block(
                            peak, total, blocks[i], lanes, V, cap, SOFTCAP, False
                        )
                for start in tl.range(batches, whole, BLOCK):
                    block = load_block(row_ptr, start + lanes, stride, False, DIFFERENTIATE)
                    peak, total = add_block(peak, total, block, lanes, V, cap, SOFTCAP, False)
                if whole < V:
                    cols = whole + lanes
                    block = load_block(row_ptr, cols, stride, True, DIFFERENTIATE)
                    peak, total = add_block(peak, total, block, cols, V, cap, SOFTCAP, True)
                level = whole_level(peak, total)
                x, _ = bend(target, cap, SOFTCAP)
                tl.store(lse_ptr + row, level * LN_2)
                tl.store(target_ptr + row, x)
            else:
                level = tl.load(lse_ptr + row) * LOG2_E
                tl.debug_barrier()  # all have read the label's logit before one overwrites it
            if DIFFERENTIATE:
                factor = 1.0 + 2.0 * z_loss * level * LN_2
                # a batch, because the compiler takes no load past the store of another block
                for start in tl.range(0, batches, BLOCK * UNROLL):
                    blocks = load_batch(row_ptr, start + lanes, stride, BLOCK, UNROLL, False)
                    for i in tl.static_range(UNROLL):
                        y = blocks[i].to(tl.float32)
                        grad = gradients(y, cap, level, factor, 0.0, SOFTCAP)
                        tl.store(row_ptr + start + i * BLOCK + lanes, grad.to(ELEMENT))
                for start in tl.range(batches, whole, BLOCK):
                    y = load_block(row_ptr, start + lanes, stride, False, False).to(tl.float32)
                    grad = gradients(y, cap, level, factor, 0.0, SOFTCAP)
                    tl.store(row_ptr + start + lanes, grad.to(ELEMENT))
                if whole < V:
                    cols = whole + lanes
                    y = load_block(row_ptr, cols, stride, True, False).to(tl.float32)
                    grad = gradients(y, cap, level, factor, 0.0, SOFTCAP)
                    tl.store(row_ptr + cols, grad.to(ELEMENT), mask=cols < stride)
                at_label = gradients(target, cap, level, factor, 1.0, SOFTCAP)
                tl.debug_barrier()  # another thread has just written this column
                tl.store(row_ptr + local, at_label.to(ELEMENT), mask=here)


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
    contiguous; statistics [2, n] fp32, rows contiguous.

    tile: overrides the choice of tiles.py.
    """
    n, V = logits.shape
    tile = tile or choose(logits.device, logits.dtype, V)
    programs = n
    if tile.programs:
        programs = min(programs, tile.programs * processors(logits.device))
    with on_device(logits):
        run(
            cross_entropy_rows_kernel, (programs,),
            logits, labels, statistics[0], statistics[1],
            n, logits.stride(0), V, terms.first_word, terms.ignore_index, terms.softcap,
            terms.z_loss, BLOCK=tile.block, UNROLL=tile.unroll, SOFTCAP=terms.softcap > 0,
            MEASURE=measures, DIFFERENTIATE=differentiates, num_warps=tile.warps,
        )  # fmt: skip
