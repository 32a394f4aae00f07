"""The backward's scores, transposed: P' and the factor of dS' for [64 keys, BM queries].

Dims: BM queries of a tile (64 or 128); a consumer warpgroup has 64 keys. See backward.py.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.hopper.masks import tanh
from kernels.attention.hopper.runs import keep_run

MINUS_INF = gl.constexpr(0xFF800000)  # its bits
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
    x, ahead, left, BM: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """x, or -inf at keys after the queries, which are `ahead` places ahead of them, or past the
    end."""
    keys = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    if CAUSAL:
        first = keys - ahead
    else:
        first = gl.where(keys < left, 0, BM)
    return keep_run(x, first, first, MINUS_INF, True, False)


@gluon.jit
def clear_of_masks(key, query, S, past, LAST: gl.constexpr, CAUSAL: gl.constexpr):
    """Whether all queries from `query` on see all keys of the tile, which ends LAST after `key`.

    Keys past the end are after all queries, so a causal mask hides them too.
    """
    if CAUSAL:
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

    The keys start at `key`, the key tile ends LAST later. MASK says whether a causal mask or the
    end of the keys hides any: NEVER, ALWAYS, or ASK.
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
    if LIMITS:
        first, last, clear_from, clear_to = seen
        if (query < clear_from) | (query + (BM - 1) > clear_to):
            low = first.load(gl.SliceLayout(1, LAYOUT)) - query
            high = last.load(gl.SliceLayout(1, LAYOUT)) + (1 - query)
            x = keep_run(x, low, high, MINUS_INF, True, True)
    elif (CAUSAL or RAGGED) and MASK == ALWAYS:
        x = _hide(x, query + past - key, S - key, BM, LAYOUT, CAUSAL)
    elif (CAUSAL or RAGGED) and MASK == ASK:
        if not clear_of_masks(key, query, S, past, LAST, CAUSAL):
            x = _hide(x, query + past - key, S - key, BM, LAYOUT, CAUSAL)
    p = gl.exp2(x)
    weight = p
    if SOFTCAP:
        weight = p * (1.0 - bent * bent)
        p = p.to(DTYPE)  # now: two tiles of fp32 would not fit in the registers
    return p, weight
