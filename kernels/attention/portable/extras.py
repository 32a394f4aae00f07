"""What bias, key mask and dropout add to the loops; a call without them compiles none of it.

BM / BN rows of a query / key tile. `query` is the row of a query, not its place among the keys;
`query` and `key` are shaped to broadcast against a tile of scores, either way round.
"""

import triton
import triton.language as tl

from kernels.attention.portable.score import LOG2_E

# How a bias is laid out: none, one row for all queries, or a number for each query and key.
NO_BIAS = tl.constexpr(0)
KEY_BIAS = tl.constexpr(1)
PAIR_BIAS = tl.constexpr(2)


@triton.jit
def bias_scores(base, stride, query, key, T, S, BIAS: tl.constexpr, CHECK: tl.constexpr):
    """The bias of these queries and keys in log2 units, [query, key] or [key, query].

    Args:
        base: the bias of this batch row and head, [T, S] with rows `stride` apart, or [S].
        CHECK: keys may lie past the end. Queries there read the last row instead: their scores
            go nowhere, and this costs less than a mask in every tile.
    """
    at = key
    if BIAS == PAIR_BIAS:
        at = tl.minimum(query, T - 1).to(tl.int64) * stride + key
    if CHECK:
        bias = tl.load(base + at, mask=key < S, other=0.0)
    else:
        bias = tl.load(base + at)
    return bias.to(tl.float32) * LOG2_E


@triton.jit
def may_be_seen(key_mask, key, S, CHECK: tl.constexpr):
    """The key mask at these keys; False past the end."""
    if CHECK:
        return tl.load(key_mask + key, mask=key < S, other=0) != 0
    else:
        return tl.load(key_mask + key) != 0


@triton.jit
def kept(seed, query, key, bh, keep_from):
    """Which weights dropout keeps, as in dropout.py; `bh` is batch * H + head.

    Args:
        keep_from: the least random word that keeps a weight, moved down by 2^31: Triton has no
            type for an unsigned argument.
    """
    word, _, _, _ = tl.philox(seed, key, query, bh, 0)
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= keep_from


@triton.jit
def finite_level(level):
    """lse in the exponent, where a bias hid every key: p is then exp2(-inf - 0), not NaN."""
    return tl.where(level == float("-inf"), 0.0, level)
