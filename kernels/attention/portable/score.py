"""What the forward and backward kernels share: loads, which columns a row sees, score units.

Scores live in log2 units (exp2 is one instruction, exp is two): score * log2(e).
`place` is a query's position among the keys: its row + S - T.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# How ALiBi enters a score. RAMP: every visible key stands at or before its query, so the bias
# slope * (key - place) is a constant per column plus one number per row: one FMA and, folded into
# the row's peak, nothing else. DISTANCE: keys on both sides, so |key - place| per element.
NO_ALIBI = tl.constexpr(0)
RAMP = tl.constexpr(1)
DISTANCE = tl.constexpr(2)

# How softcap computes tanh; see there.
NO_SOFTCAP = tl.constexpr(0)
FAST_TANH = tl.constexpr(1)
FULL_TANH = tl.constexpr(2)


@triton.jit
def load_rows(
    base, offsets, rows, dims, n_rows, D: tl.constexpr, BD: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """A [rows, BD] tile at base + offsets; rows from n_rows and dims from D on come as zeros.

    Steady-state tiles pass CHECK_ROWS=False and, for a head size that is a power of two, load
    without any mask.
    """
    if CHECK_ROWS:
        if D == BD:
            return tl.load(base + offsets, mask=rows[:, None] < n_rows, other=0.0)
        else:
            mask = (rows[:, None] < n_rows) & (dims[None, :] < D)
            return tl.load(base + offsets, mask=mask, other=0.0)
    else:
        if D == BD:
            return tl.load(base + offsets)
        else:
            return tl.load(base + offsets, mask=dims[None, :] < D, other=0.0)


@triton.jit
def load_tile(
    source, offsets, b, start, h, n_rows,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHECK_ROWS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows start ... start + N of one head, [N, BD].

    Args:
        source: with TMA a descriptor of the whole [B, rows, H, D] tensor, whose hardware fills
            rows and dims past the end with zeros; else a pointer to row `start` of this head.
    """
    if TMA:
        return source.load([b, start, h, 0]).reshape([N, BD])
    else:
        rows = start + tl.arange(0, N)
        return load_rows(source, offsets, rows, tl.arange(0, BD), n_rows, D, BD, CHECK_ROWS)


@triton.jit
def seen_range(
    index, n_indices, shift, before, after, length, bounds,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """First and last place in [0, length) that `index` (a scalar or a vector) sees.

    Causality, windows and documents all leave one interval per query, and seen from a key one
    interval of queries, and both ends only grow with the index. So the ends at a tile's first
    and last row bound every loop, and two comparisons are the whole mask. An index that sees
    nothing has last < first.
    """
    centre = index + shift
    if BEFORE:
        first = tl.maximum(centre - before, 0)
    else:
        first = centre * 0
    if AFTER:
        last = tl.minimum(centre + after, length - 1)
    else:
        last = centre * 0 + (length - 1)
    if DOCUMENTS:
        inside = index < n_indices
        first = tl.maximum(first, tl.load(bounds + index, mask=inside, other=0))
        end = tl.load(bounds + n_indices + index, mask=inside, other=0)
        last = tl.minimum(last, end - 1)
    return first, last


@triton.jit
def key_tiles(
    tile, T, S, before, after, bounds, key_range,
    BM: tl.constexpr, BN: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    DOCUMENTS: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Which key tiles a tile of queries visits, and which of them every row sees whole.

    Both ends of what a row sees grow with the row, so the first and last row bound the loops:
    [begin, end) is visited and needs no mask in [full_begin, full_end).
    """
    shift = S - T
    first_row, last_row = tile * BM, tl.minimum(tile * BM + BM, T) - 1
    first_a, last_a = seen_range(
        first_row, T, shift, before, after, S, bounds, BEFORE, AFTER, DOCUMENTS
    )
    first_z, last_z = seen_range(
        last_row, T, shift, before, after, S, bounds, BEFORE, AFTER, DOCUMENTS
    )
    if KEY_MASK:  # one more interval, the same for all rows of this batch row
        first_key, last_key = tl.load(key_range), tl.load(key_range + 1)
        first_a, first_z = tl.maximum(first_a, first_key), tl.maximum(first_z, first_key)
        last_a, last_z = tl.minimum(last_a, last_key), tl.minimum(last_z, last_key)
    begin, end = first_a // BN * BN, last_z + 1
    full_begin = (first_z + BN - 1) // BN * BN
    full_end = tl.maximum(last_a + 1, 0) // BN * BN
    return begin, end, full_begin, full_end


@triton.jit
def tanh(x, SOFTCAP: tl.constexpr = FAST_TANH):
    """Through exp2, because libdevice has no interpreter; exact at both ends, as exp2 saturates.

    Near 0 that keeps an absolute error of one rounding of 1, which is less than half precision
    sees of a score, but many roundings of a float32 one: FULL_TANH has a polynomial there (our
    least-squares fit of tanh on [-0.625, 0.625], relative error 4e-9).
    """
    y = 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0)
    if SOFTCAP == FULL_TANH:
        z = x * x
        series = 0.133314422 + z * (-0.0537397148 + z * (0.0206390866 - z * 0.00570498633))
        y = tl.where(z < 0.390625, x + x * z * (-0.333332819 + z * series), y)
    return y


@triton.jit
def log2_scores(s, query, key, ramp, scale, cap, slope, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products q k -> scores in log2 units with every bias, and tanh's value for its derivative.

    `query` and `key` are places and `ramp` is slope * (key - first key of the tile), all shaped
    to broadcast against s, which may be [query, key] or [key, query]. Under RAMP each row still
    lacks `ramp_level`.
    """
    bent = s
    if SOFTCAP:
        bent = tanh(s * scale, SOFTCAP)
        s = cap * bent
    else:
        s = s * scale
    if ALIBI == DISTANCE:
        s -= slope * tl.abs(query - key).to(tl.float32)
    if ALIBI == RAMP:
        s += ramp
    return s, bent


@triton.jit
def ramp_level(first_key, place, slope):
    """The part of RAMP's bias that is one number per query in a tile."""
    return slope * (first_key - place).to(tl.float32)
