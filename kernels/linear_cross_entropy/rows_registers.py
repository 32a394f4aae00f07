"""The rows of a chunk in Triton, each read once: its logits stay in registers between the walks.

Dims: n rows of the chunk, V words, all of the vocabulary. rows_triton.py has the formulas, and the
kernel for what does not fit here, which reads a row twice.

A program takes row after row, TILES blocks of columns each, and loads a block of the next row as
soon as the gradient of that block is on its way: reading goes on under the computing. Two bf16 are
one word of 32 bits here, because the compiler would give each of them a register.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows while the kernel is compiled)

import triton
import triton.language as tl

from kernels.linear_cross_entropy.rows_parts import (
    GROUP,
    LN_2,
    LOWEST,
    add_scores,
    bend,
    gradients,
    whole_level,
)


@triton.jit
def load_words(row_ptr, at, pitch, wanted, LAST: tl.constexpr):
    """One block of a row; 0 where the row is not wanted and beyond its padding."""
    mask = wanted & (at >= 0)
    if LAST:
        mask = wanted & (at < pitch)
    return tl.load(row_ptr + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def widen(words, BLOCK: tl.constexpr):
    """The bf16 of [groups, GROUP / 2] words as fp32 [groups, GROUP]."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [BLOCK // GROUP, GROUP])


@triton.jit
def registers_rows_kernel(
    logits_ptr,  # [n, V] bf16, becomes dlogits; rows `stride` apart, padding between
    labels_ptr,  # [n] integers
    lse_ptr, target_ptr,  # [n] fp32
    n, stride, V, first_word, ignore_index, cap, z_loss,
    BLOCK: tl.constexpr, TILES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    groups = tl.arange(0, BLOCK // GROUP)[:, None]
    lanes = groups * GROUP + tl.arange(0, GROUP)[None, :]
    pairs = groups * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    pitch = stride // 2
    words_ptr = logits_ptr.to(tl.pointer_type(tl.int32))
    # 0, which the compiler cannot know: else it keeps what the first walk makes of each word, two
    # registers for one, to have it ready for the second
    zero = stride >> 31
    label = tl.load(labels_ptr + tl.program_id(0)).to(tl.int64)
    row_words = words_ptr + tl.program_id(0).to(tl.int64) * pitch
    kept = ()
    for t in tl.static_range(TILES):
        wanted = label != ignore_index
        kept += (load_words(row_words, t * HALF + pairs, pitch, wanted, t == TILES - 1),)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        row_ptr = logits_ptr + (row + tl.zeros([], tl.int64)) * stride
        counts = label != ignore_index
        local = label - first_word
        here = counts & (local >= 0) & (local < V)
        local = tl.where(here, local, 0).to(tl.int32)
        target = tl.load(row_ptr + local, mask=here, other=0.0).to(tl.float32)
        following = row + tl.num_programs(0)
        label = tl.load(labels_ptr + following, mask=following < n, other=ignore_index).to(tl.int64)
        wanted = label != ignore_index
        row_words = words_ptr + (following + tl.zeros([], tl.int64)) * pitch

        peak = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
        total = tl.zeros([BLOCK // GROUP], tl.float32)
        for t in tl.static_range(TILES):
            x, _ = bend(widen(kept[t], BLOCK), cap, SOFTCAP)
            if t == TILES - 1:
                x = tl.where(t * BLOCK + lanes < V, x, float("-inf"))
            peak, total = add_scores(peak, total, x)
        level = whole_level(peak, total)
        # all of an ignored row's words are 0 and get a gradient of 0
        factor = tl.where(counts, 1.0 + 2.0 * z_loss * level * LN_2, 0.0)
        x, _ = bend(target, cap, SOFTCAP)
        tl.store(lse_ptr + row, tl.where(counts, level * LN_2, 0.0))
        tl.store(target_ptr + row, x)

        later = ()
        for t in tl.static_range(TILES):
            y = widen(kept[t] ^ zero, BLOCK)
            grad = gradients(y, cap, level, factor, 0.0, SOFTCAP).to(logits_ptr.dtype.element_ty)
            if t == TILES - 1:
                tl.store(row_ptr + t * BLOCK + lanes, grad, mask=t * BLOCK + lanes < stride)
            else:
                tl.store(row_ptr + t * BLOCK + lanes, grad)
            later += (load_words(row_words, t * HALF + pairs, pitch, wanted, t == TILES - 1),)
        kept = later
        at_label = gradients(target, cap, level, factor, 1.0, SOFTCAP)
        tl.debug_barrier()  # another thread has just written this column
        tl.store(row_ptr + local, at_label.to(logits_ptr.dtype.element_ty), mask=here)
