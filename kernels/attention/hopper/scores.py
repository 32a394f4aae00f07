"""The backward's scores, transposed: P' and the factor of dS' for [64 keys, BM queries].

Dims: BM queries of a tile (64 or 128); a consumer warpgroup has 64 keys. See backward.py.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.hopper.masks import tanh
from kernels.attention.hopper.runs import keep_run

MINUS_INF, ZERO = gl.constexpr(0xFF800000), gl.constexpr(0)  # bits of fp32
LOG2_E = gl.constexpr(1.4426950408889634)
NEVER, ALWAYS, ASK = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def minus_delta(delta, nothing, BM: gl.constexpr, COL: gl.constexpr):
    """[64 keys, BM], where dP' may start to add up: it saves 8 to 32 registers over a subtraction.

    Not when dP' is issued while S' is in flight: ptxas then makes it wait for S' (C7517).
    """
    start, _ = gl.broadcast(delta.reshape([BM]).load(COL)[None, :], nothing)
    return start


@gluon.jit
def _hide(
    x, key, query, S, past, seen,
    OTHER: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    LIMITS: gl.constexpr,
):  # fmt: skip
    """x, or OTHER at keys that a query does not see or that are past the end."""
    keys = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    if LIMITS:
        low = seen[0].load(gl.SliceLayout(1, LAYOUT)) - query
        high = seen[1].load(gl.SliceLayout(1, LAYOUT)) + (1 - query)
        return keep_run(x, low, high, OTHER, True, True)
    if CAUSAL:
        first = keys + (key - query - past)
    else:
        first = gl.where(keys < S - key, 0, BM)
    return keep_run(x, first, first, OTHER, True, False)


@gluon.jit
def _hide_both(
    p, weight, key, query, S, past, seen,
    BM: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """p, of fp16 or bf16, and weight; 0 where _hide hides."""
    wide = _hide(p.to(gl.float32), key, query, S, past, seen, ZERO, BM, LAYOUT, CAUSAL, LIMITS)
    weight = _hide(weight, key, query, S, past, seen, ZERO, BM, LAYOUT, CAUSAL, LIMITS)
    return wide.to(p.dtype), weight


@gluon.jit
def _clear_of_masks(
    key, query, S, past, seen,
    BM: gl.constexpr, LAST: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """Whether all queries from `query` on see all keys of the tile, which ends LAST after `key`.

    Keys past the end are after all queries, so a causal mask hides them too.
    """
    if LIMITS:
        clear = (query >= seen[2]) & (query + (BM - 1) <= seen[3])
    elif CAUSAL:
        clear = query + past >= key + LAST
    else:
        clear = key + 64 <= S
    return clear


@gluon.jit
def probabilities(
    s, lse, places, seen, ramp, scale, bend, key, query, S, past,
    BM: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr,
    RAGGED: gl.constexpr, ALIBI: gl.constexpr, SOFTCAP: gl.constexpr, DTYPE: gl.constexpr,
    LAST: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """P' of S' [64 keys, BM queries], and the factor of dP' in dS': P' times the slope of the cap.

    The keys start at `key`, the key tile ends LAST later. MASK says whether masks hide any: NEVER,
    ALWAYS, or ASK; with LIMITS it is ASK.
    """
    if SOFTCAP:
        cap, inner = bend
        bent = tanh(s * inner)
        s = bent * cap
    else:
        s = s * scale
    # place numbers come out of shared memory: as constants they would stay in registers
    if ALIBI:  # both parts counted from the tile's first key: small where P is not
        keys = places.slice(0, 64).load(gl.SliceLayout(1, LAYOUT))
        queries = places.slice(0, BM).load(gl.SliceLayout(0, LAYOUT))
        lse = lse + ramp * (queries + (query + past - key)).to(gl.float32)
        x = s - lse[None, :] + (ramp * keys.to(gl.float32))[:, None]
    else:
        x = s - lse[None, :]
    MASKS: gl.constexpr = LIMITS != 0 or ((CAUSAL or RAGGED) and MASK != NEVER)
    hides = True
    if MASKS and MASK == ASK:
        hides = not _clear_of_masks(key, query, S, past, seen, BM, LAST, CAUSAL, LIMITS)
    if SOFTCAP:
        p = gl.exp2(x)
        weight = p * (1.0 - bent * bent)
        p = p.to(DTYPE)  # now: two tiles of fp32 would not fit in the registers
        if MASKS:
            if hides:
                p, weight = _hide_both(
                    p, weight, key, query, S, past, seen, BM, LAYOUT, CAUSAL, LIMITS
                )
    else:  # before the exponentials, which then can stand between the products of dP
        if MASKS:
            if hides:
                x = _hide(x, key, query, S, past, seen, MINUS_INF, BM, LAYOUT, CAUSAL, LIMITS)
        p = gl.exp2(x)
        weight = p
    return p, weight
