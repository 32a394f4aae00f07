"""What the two row kernels share: one block of a row at a time, a [groups, GROUP] tensor of fp32.

With y a product, x is the (capped) logit and `bent` tanh's value. `level` is lse in log2 units and
`factor` 1 + 2 z lse.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # no infinity, whose difference to itself is no number
GROUP = tl.constexpr(8)  # neighbours, 16 bytes of bf16: a thread has them all


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
