"""Which keys a query sees, and the other way round, for windows and documents; the soft cap.

Dims: T queries, S keys, BM / BN rows of a query / key tile. Query t stands at place t + S - T.

A causal mask, a window and packed documents all leave each query one interval of keys, and each
key one interval of queries, and both ends only move right with the index. So the ends at a tile's
first and last row say which tiles it needs, tiles inside the intervals of all rows need no mask,
and elsewhere the ends of each row are the mask (runs.py). LIMITS says what the ends depend on; 0 is
a plain causal or full mask, whose kernels have their own, shorter code.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BEFORE = gl.constexpr(1)  # a query sees at most `before` keys before its place
AFTER = gl.constexpr(2)  # and `after` behind it
DOCUMENTS = gl.constexpr(4)  # and only those of its own document; T is S
DIAGONAL = gl.constexpr(8)  # `after` is 0: then where a document ends says nothing of its queries,
#                             and where it starts nothing of its keys


@gluon.jit
def first_seen(index, shift, reach, starts, BOUND: gl.constexpr, DOCUMENTS: gl.constexpr):
    """The first place that sees or is seen by `index`, a number or a vector, inside [0, length).

    Args:
        shift: from `index` to its place on the other side.
        reach: places before that one; counts if BOUND.
        starts: pointer to the first place of each index's document; read if DOCUMENTS.
    """
    first = index * 0
    if BOUND:
        first = gl.maximum(index + (shift - reach), 0)
    if DOCUMENTS:
        first = gl.maximum(first, gl.load(starts + index))
    return first


@gluon.jit
def last_seen(index, shift, reach, ends, length, BOUND: gl.constexpr, DOCUMENTS: gl.constexpr):
    """The last place, as above; `ends` points behind each document. Below 0 where there is none."""
    last = index * 0 + (length - 1)
    if BOUND:
        last = gl.minimum(index + (shift + reach), length - 1)
    if DOCUMENTS:
        last = gl.minimum(last, gl.load(ends + index) - 1)
    return last


@gluon.jit
def _runs_of(bounds_ptr, b, T, LIMITS: gl.constexpr):
    """Pointers to where the document of each token of batch `b` starts and ends."""
    starts = 0
    ends = 0
    if LIMITS & DOCUMENTS:
        starts = bounds_ptr + gl.cast(b, gl.int64) * 2 * T
        ends = starts + T
    return starts, ends


@gluon.jit
def keys_of(index, b, T, S, limits, LIMITS: gl.constexpr):
    """(first, last) key that query `index` sees; rows past the end see what the last one does."""
    NEAR: gl.constexpr = (LIMITS & DOCUMENTS) > 0 and (LIMITS & DIAGONAL) == 0
    before, after, bounds_ptr = limits
    starts, ends = _runs_of(bounds_ptr, b, T, LIMITS)
    index = gl.minimum(index, T - 1)
    first = first_seen(index, S - T, before, starts, LIMITS & BEFORE, LIMITS & DOCUMENTS)
    last = last_seen(index, S - T, after, ends, S, LIMITS & AFTER, NEAR)
    return first, last


@gluon.jit
def queries_of(index, b, T, S, limits, LIMITS: gl.constexpr):
    """(first, last) query that sees key `index`; none, so last < first, sees keys past the end."""
    NEAR: gl.constexpr = (LIMITS & DOCUMENTS) > 0 and (LIMITS & DIAGONAL) == 0
    before, after, bounds_ptr = limits
    starts, ends = _runs_of(bounds_ptr, b, T, LIMITS)
    inside = gl.minimum(index, S - 1)
    first = first_seen(inside, T - S, after, starts, LIMITS & AFTER, NEAR)
    last = last_seen(inside, T - S, before, ends, T, LIMITS & BEFORE, LIMITS & DOCUMENTS)
    return first, gl.where(index < S, last, -1)


@gluon.jit
def key_tiles(
    row, last_row, b, T, S, limits, BN: gl.constexpr, CAUSAL: gl.constexpr, LIMITS: gl.constexpr
):  # fmt: skip
    """(first, how many) key tiles the rows from `row` to `last_row` see; at least one."""
    low = 0
    if LIMITS:
        first, _ = keys_of(row, b, T, S, limits, LIMITS)
        _, last = keys_of(last_row, b, T, S, limits, LIMITS)
        low = first // BN
        count = last // BN + 1 - low
    else:
        end = S
        if CAUSAL:
            end = gl.minimum(S, last_row + 1 + (S - T))
        count = (end + BN - 1) // BN
    return low, count


@gluon.jit
def query_tiles(
    key, b, T, S, limits, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr,
    LIMITS: gl.constexpr,
):  # fmt: skip
    """(first query, how many tiles) that see the BN keys from `key` on.

    At least one tile, which then is all masked: no key may be left without its zero gradient.
    """
    first = 0
    if LIMITS:
        first, _ = queries_of(key, b, T, S, limits, LIMITS)
        _, last = queries_of(gl.minimum(key + BN, S) - 1, b, T, S, limits, LIMITS)
        first = first // BM * BM
        count = gl.maximum((last - first) // BM + 1, 1)
    else:
        if CAUSAL:
            first = gl.maximum(key - (S - T), 0) // BM * BM
        count = (T - first + BM - 1) // BM
    return first, count


@gluon.jit
def tanh(x):
    """One instruction; its relative error is at most 2 ** -11, a rounding of float16."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
