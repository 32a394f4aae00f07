"""What the forward's consumers share: the online softmax, biases and masks of scores."""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.masks import tanh

# Finite, since a row that sees no key of its first tile must not become NaN; and a power of two, so
# that `s * scale - shift` is exactly 0 for it: with -1e30 the fused multiply-add keeps the rounding
# error of `shift`, about 1e22, and its power of two is inf (seen at 77 queries over 200 keys).
MASKED = gl.constexpr(-(2.0**100))
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _exp2_code(n):
    """Assembly for 8 exponentials, n of them on the multiply-add pipes.

    2 ** x = 2 ** floor(x) * (1 + r (c1 + r (c2 + r c3))), r = x - floor(x): relative error 9e-5, a
    twentieth of a rounding of bfloat16. floor(x) comes from the rounding of x + 1.5 * 2 ** 23 and
    goes straight into the exponent. Below 2 ** -127 the result is 0 or almost.
    """
    code = "{ .reg .f32 x, f, r, p; .reg .b32 i, j;"
    for k in range(8):
        if (k * n) % 8 + n >= 8:  # evenly spread
            code += f"""
                max.NaN.ftz.f32 x, ${k + 8}, 0fC2FE0000;
                add.rm.ftz.f32 f, x, 0f4B400000;
                sub.ftz.f32 r, f, 0f4B400000;
                sub.ftz.f32 r, x, r;
                fma.rn.ftz.f32 p, r, 0f3D9DD553, 0f3E691BC5;
                fma.rn.ftz.f32 p, p, r, 0f3F31F32C;
                fma.rn.ftz.f32 p, p, r, 0f3F800000;
                mov.b32 i, f;
                mov.b32 j, p;
                shl.b32 i, i, 23;
                add.s32 i, i, j;
                mov.b32 ${k}, i;"""
        else:
            code += f" ex2.approx.ftz.f32 ${k}, ${k + 8};"
    return code + " }"


@gluon.jit
def exp2_of(x, POLY: gl.constexpr):
    """2 ** x, x <= 8; POLY of 8 by a polynomial: exp2 has a pipe of its own, and it is narrow."""
    if POLY == 0:
        return gl.exp2(x)
    CODE: gl.constexpr = _exp2_code(POLY)
    return gl.inline_asm_elementwise(
        CODE, "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f", [x], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.constexpr_function
def _shrink_code(n):
    """Assembly for n elements of a thread: multiply them, unless no thread of the warp must."""
    rows = f"${2 * n}", f"${2 * n + 2}"  # how much the thread's two rows shrink
    code = f"{{ .reg .pred p, q; setp.neu.f32 p, {rows[0]}, 0f3F800000;"
    code += f" setp.neu.or.f32 p, {rows[1]}, 0f3F800000, p; vote.sync.any.pred q, p, 0xffffffff;"
    for i in range(n):
        code += f" mov.f32 ${i}, ${n + i};"
    code += " @!q bra.uni DONE;"
    for i in range(n):
        code += f" mul.f32 ${i}, ${n + i}, ${2 * n + i};"
    return code + " DONE: }"


@gluon.constexpr_function
def _constraints(n):
    return ",".join(["=f"] * n + ["f"] * (2 * n))


@gluon.jit
def shrink_rows(acc, shrink, LAZY: gl.constexpr):
    """acc [64, D] times shrink [64]; LAZY: warps whose 16 rows all keep their scale skip it."""
    if LAZY:
        N: gl.constexpr = acc.shape[1] // 2  # elements of a thread
        CODE: gl.constexpr = _shrink_code(N)
        TYPES: gl.constexpr = _constraints(N)
        factors, _ = gl.broadcast(shrink[:, None], acc)
        return gl.inline_asm_elementwise(
            CODE, TYPES, [acc, factors], dtype=gl.float32, is_pure=True, pack=N
        )
    return acc * shrink[:, None]


@gluon.jit
def softmax_step(s, peak, total, scale, LAZY: gl.constexpr, POLY: gl.constexpr):
    """Online softmax: P of these scores, and by how much what came before shrinks.

    LAZY: `peak` stays until the scores exceed it by a factor of 2 ** 8, which P and total have room
    for; so after the first tiles nothing shrinks. It need not be the maximum: it cancels.
    """
    new_peak = gl.maximum(peak, gl.max(s, 1))
    if LAZY:
        new_peak = gl.where((new_peak - peak) * scale > 8.0, new_peak, peak)
    shift = new_peak * scale
    p = exp2_of(s * scale - shift[:, None], POLY)
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


@gluon.jit
def hide(s, cols, first, limit, LIMITS: gl.constexpr):
    """Rows see keys from `first` [64], counted under LIMITS only, to below `limit` [64]."""
    seen = cols[None, :] < limit[:, None]
    if LIMITS:
        seen = seen & (cols[None, :] >= first[:, None])
    return gl.where(seen, s, MASKED)


@gluon.jit
def pass_by(n, it, k_ring, v_ring, STAGES: gl.constexpr):
    """Let n key tiles go that only other rows of this tile see."""
    _, k_full, k_empty = k_ring
    _, v_full, v_empty = v_ring
    for _ in range(n):
        s = it % STAGES
        mbarrier.wait(k_full.index(s), (it // STAGES) & 1)
        mbarrier.arrive(k_empty.index(s), count=1)
        mbarrier.wait(v_full.index(s), (it // STAGES) & 1)
        mbarrier.arrive(v_empty.index(s), count=1)
        it += 1
    return it
