"""Which sample stands where in the order: a pure function, so nothing has to be stored or shared.

Every epoch is its own permutation of the samples, computed per element by a keyed Feistel network
(Luby & Rackoff 1988): each round xors one half of the bits with a hash of the other, which undoes
itself, so the network is a bijection whatever the hash. Indices that fall outside the samples walk
on through the network until they fall inside (cycle walking, Black & Rogaway 2002). A trillion
tokens are thus shuffled in no memory, and any position is found without those before it.
"""

from typing import overload

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

# 4 rounds are already indistinguishable from random on large domains; 8 keep permutations of a
# dozen samples, whose halves are 2 bits wide, from showing structure
ROUNDS = 8
_MASK64 = (1 << 64) - 1


@overload
def sample_index(seed: int, position: int, n_samples: int) -> int: ...
@overload
def sample_index(seed: int, position: NDArray[np.int64], n_samples: int) -> NDArray[np.int64]: ...
def sample_index(
    seed: int, position: int | NDArray[np.int64], n_samples: int
) -> int | NDArray[np.int64]:
    """Index in [0, n_samples) of the sample at `position` of the endless order.

    Positions e * n_samples ... (e + 1) * n_samples - 1 are epoch e: each sample exactly once.
    `position` is a number or an int64 array of any shape, and so is the result.
    """
    where = np.asarray(position, dtype=np.int64)
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} must be at least 1")
    if where.size and where.min() < 0:
        raise ValueError(f"position {where.min()} is negative")
    epoch, offset = np.divmod(where.reshape(-1), n_samples)
    key = splitmix64(epoch.astype(np.uint64) + splitmix64(np.uint64(seed & _MASK64)))
    index = _permute(offset.astype(np.uint64), key, n_samples).astype(np.int64)
    return int(index[0]) if where.ndim == 0 else index.reshape(where.shape)


def derived_seed(seed: int, purpose: str) -> int:
    """Another one for each purpose."""
    return xxhash.xxh3_64_intdigest(purpose.encode(), seed=seed & _MASK64)


def splitmix64(x: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash, bijective, all bits avalanche (Steele, Lea & Flood 2014)."""
    z = np.atleast_1d(np.asarray(x, dtype=np.uint64))  # arrays wrap silently, scalars would warn
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _permute(x: NDArray[np.uint64], key: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """x [k] in [0, n) -> its place under the permutation that `key` [k] names."""
    bits = (n - 1).bit_length()  # domain 2^bits < 2n: fewer than two walks on average
    y = _feistel(x, key, bits)
    outside = np.flatnonzero(y >= n)
    while outside.size:
        y[outside] = _feistel(y[outside], key[outside], bits)
        outside = outside[y[outside] >= n]
    return y


def _feistel(x: NDArray[np.uint64], key: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """A bijection of [0, 2^bits). Halves need not be equal: each round changes one of them."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    high, low = x >> low_bits, x & low_mask
    for step in range(ROUNDS):
        round_key = splitmix64(key + np.uint64(step))
        low = low ^ (splitmix64(high ^ round_key) & low_mask)
        high = high ^ (splitmix64(low + round_key) & high_mask)
    return (high << low_bits) | low
