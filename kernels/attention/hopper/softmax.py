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
def _row_max(s, LAYOUT: gl.constexpr, FAR: gl.constexpr):
    """The largest of each row. A reduction takes a thread's numbers one after the other, each step
    waiting for the one before; FAR: columns far apart are compared first, all at the same time."""
    if FAR:
        x = s
        for _ in gl.static_range(3):
            a, b = gl.split(x.reshape([64, 2, x.shape[1] // 2]).permute((0, 2, 1)))
            x = gl.maximum(a, b)
        most = gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    else:
        most = gl.max(s, 1)
    return most


@gluon.jit
def softmax_step(s, peak, total, scale, LAYOUT: gl.constexpr, FAR: gl.constexpr):
    """Online softmax: P of these scores, and by how much what came before shrinks."""
    new_peak = gl.maximum(peak, _row_max(s, LAYOUT, FAR))
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
