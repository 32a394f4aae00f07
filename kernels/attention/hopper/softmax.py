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
# [64, 4]: a thread's share of the sums of its two rows
SUMS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def softmax_step(s, peak, total, scale):
    """Online softmax: P of these scores, and by how much what came before shrinks.

    total: [64, 4], of each row what each of its four threads has summed. They add that up once, at
    the tile's end; a sum over all columns here would have them exchange it at every step, and would
    be a chain of 32 additions, not of 16.
    """
    new_peak = gl.maximum(peak, gl.max(s, 1))
    shift = new_peak * scale
    p = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(peak * scale - shift)
    own = gl.sum(gl.sum(p.reshape([64, p.shape[1] // 8, 4, 2]), 1), 2)
    own = gl.convert_layout(own, SUMS, assert_trivial=True)
    fewer = gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)
    return p, new_peak, total * fewer[:, None] + own, shrink


@gluon.jit
def bias_scores(s, cols, origin, ramp, bend, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr):
    """The soft cap, by (cap, scale / cap), and ALiBi at the keys `cols` [BN]."""
    if SOFTCAP:
        cap, inner = bend
        s = cap * tanh(s * inner)
    if ALIBI:
        s = s + (ramp * (cols - origin).to(gl.float32))[None, :]
    return s
