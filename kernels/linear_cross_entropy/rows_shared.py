"""The rows of a chunk in Gluon, each read once: its logits stay in shared memory between the walks.

Dims: n rows of the chunk, V words, all of the vocabulary. rows_triton.py has the formulas, and the
kernel for what does not fit here, which reads a row twice.

A program takes row after row, TILES blocks of columns each, and has the next row's block copied to
the place of one as soon as its gradient is on its way. A block is one group of asynchronous copies;
the first walk commits an empty group for each block it waits for, so that the one waited for is
always the TILES-th last.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.linear_cross_entropy.rows_parts import (
    GROUP,
    LN_2,
    LOWEST,
    add_scores,
    bend,
    gradients,
    whole_level,
)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the name changed after Triton 3.7


@gluon.jit
def copy_block(place, row_ptr, cols, stride, wanted):
    """One block on its way; 0 where the row is not wanted and beyond its padding."""
    async_copy.async_copy_global_to_shared(place, row_ptr + cols, mask=wanted & (cols < stride))
    async_copy.commit_group()


@gluon.jit
def shared_rows_kernel(
    logits_ptr,  # [n, V], becomes dlogits; rows `stride` apart, padding between
    labels_ptr,  # [n] integers
    lse_ptr, target_ptr,  # [n] fp32
    n, stride, V, first_word, ignore_index, cap, z_loss,
    BLOCK: gl.constexpr, TILES: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, GROUP], [32, 1], [gl.num_warps(), 1], [1, 0])
    EACH: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ELEMENT: gl.constexpr = logits_ptr.dtype.element_ty
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    places = gl.allocate_shared_memory(ELEMENT, [TILES, BLOCK // GROUP, GROUP], PLAIN)
    groups = gl.arange(0, BLOCK // GROUP, EACH)[:, None]
    lanes = groups * GROUP + gl.arange(0, GROUP, gl.SliceLayout(0, LAYOUT))[None, :]
    label = gl.load(labels_ptr + gl.program_id(0)).to(gl.int64)
    row_ptr = logits_ptr + gl.cast(gl.program_id(0), gl.int64) * stride
    for t in range(TILES):
        copy_block(places.index(t), row_ptr, t * BLOCK + lanes, stride, label != ignore_index)
    for row in range(gl.program_id(0), n, gl.num_programs(0)):
        row_ptr = logits_ptr + gl.cast(row, gl.int64) * stride
        counts = label != ignore_index
        local = label - first_word
        here = counts & (local >= 0) & (local < V)
        local = gl.where(here, local, 0).to(gl.int32)
        target = gl.load(row_ptr + local, mask=here, other=0.0).to(gl.float32)
        following = gl.cast(row + gl.num_programs(0), gl.int64)
        label = gl.load(labels_ptr + following, mask=following < n, other=ignore_index).to(gl.int64)
        next_ptr = logits_ptr + following * stride

        peak = gl.full([BLOCK // GROUP], LOWEST, gl.float32, EACH)
        total = gl.full([BLOCK // GROUP], 0.0, gl.float32, EACH)
        for t in range(TILES - 1):
            async_copy.wait_group(TILES - 1)
            async_copy.commit_group()
            x, _ = bend(places.index(t).load(LAYOUT).to(gl.float32), cap, SOFTCAP)
            peak, total = add_scores(peak, total, x)
        async_copy.wait_group(TILES - 1)
        async_copy.commit_group()
        x, _ = bend(places.index(TILES - 1).load(LAYOUT).to(gl.float32), cap, SOFTCAP)
        x = gl.where((TILES - 1) * BLOCK + lanes < V, x, float("-inf"))
        peak, total = add_scores(peak, total, x)
        level = whole_level(peak, total)
        # all of an ignored row's logits are 0 and get a gradient of 0
        factor = gl.where(counts, 1.0 + 2.0 * z_loss * level * LN_2, 0.0)
        x, _ = bend(target, cap, SOFTCAP)
        gl.store(lse_ptr + row, gl.where(counts, level * LN_2, 0.0))
        gl.store(target_ptr + row, x)

        for t in range(TILES):
            cols = t * BLOCK + lanes
            y = places.index(t).load(LAYOUT).to(gl.float32)
            grad = gradients(y, cap, level, factor, 0.0, SOFTCAP).to(ELEMENT)
            gl.store(row_ptr + cols, grad, mask=cols < stride)
            copy_block(places.index(t), next_ptr, cols, stride, label != ignore_index)
        at_label = gradients(target, cap, level, factor, 1.0, SOFTCAP)
        barrier()  # another thread has just written this column
        gl.store(row_ptr + local, at_label.to(ELEMENT), mask=here)
    async_copy.wait_group(0)
