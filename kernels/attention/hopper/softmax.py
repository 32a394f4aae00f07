"""The forward's online softmax, and what changes scores before it: soft cap and ALiBi."""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.hopper.masks import tanh

# Finite, since a row that sees no key of its first tile must not become NaN; and a power of two, so
# that `s * scale - shift` is exactly 0 for it: with -1e30 the fused multiply-add keeps the rounding
# error of `shift`, about 1e22, and its power of two is inf (seen at 77 queries over 200 keys).
MASKED = gl.constexpr(-(2.0**100))
MASKED_BITS = gl.constexpr(0xF1800000)  # of that number
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def softmax_step(s, peak, total, scale):
    """Online softmax: P of these scores, and by how much what came before shrinks."""
    new_peak = gl.maximum(peak, gl.max(s, 1))
    shift = new_peak * scale
    p = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(peak * scale - shift)
    return p, new_peak, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def bias_scores(s, cols, origin, ramp, bend, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr):
    """The soft cap, by (cap, scale / cap), and ALiBi at the keys `cols` [BN]."""
    if SOFTCAP:
        cap, inner = bend
        s = cap * tanh(s * inner)
    if ALIBI:
        s = s + (ramp * (cols - origin).to(gl.float32))[None, :]
    return s
