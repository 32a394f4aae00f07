"""Which source gives the next sample, for sources mixed by weight.

Place p of the endless order belongs to one source, and of the first p places source k has had
count_k(p) = p weight_k / (sum of weights), give or take less than the depth of the tree below: not
on average but always. So a run of any length, a single batch too, has the mix that was asked for.

Counts are closed formulas: sources are split into two halves, and of n places the left half has had
round(n left / both); its share is split in the same way, down to single sources. Nothing is drawn
at random and nothing is remembered, so any place can be asked for at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.mapped import DataError

# n * weight stays inside int64 for 2^40 samples
LARGEST_SUM = 1 << 22


@dataclass(frozen=True)
class Phase:
    """Weights of all sources from sample `start` on."""

    start: int
    weights: tuple[float, ...]


class Mix:
    """Sample number <-> (source, how many of that source came before)."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        """`phases` in order, the first from 0; raises DataError for weights that mean nothing."""
        self._starts = np.array([phase.start for phase in phases], np.int64)
        if self._starts[0] != 0 or (np.diff(self._starts) <= 0).any():
            raise DataError(
                f"weights change at samples {self._starts[1:].tolist()}: each change must come "
                "after the one before"
            )
        self._weights = [whole_weights(phase.weights) for phase in phases]
        self.n_sources = len(phases[0].weights)
        # [phases, K]: what each source has had when a phase begins
        self._before = np.zeros((len(phases), self.n_sources), np.int64)
        for i in range(1, len(phases)):
            length = self._starts[i : i + 1] - self._starts[i - 1]
            done = _counts(self._weights[i - 1], length)[:, 0]
            self._before[i] = self._before[i - 1] + done

    def counts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[K, n]: samples of each source among the first `positions` [n]."""
        phase = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.empty((self.n_sources, len(positions)), np.int64)
        for i in np.unique(phase).tolist():
            here = phase == i
            inside = _counts(self._weights[i], positions[here] - self._starts[i])
            found[:, here] = self._before[i][:, None] + inside
        return found

    def place(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source [n], its own sample number [n]) of `positions` [n]."""
        before = self.counts(positions)
        source = (self.counts(positions + 1) - before).argmax(0)
        return source, np.take_along_axis(before, source[None], 0)[0]

    def longest(self, sizes: Sequence[int]) -> int:
        """The largest n whose first n places ask no source for more than its size."""

        def fits(n: int) -> bool:
            counts = self.counts(np.array([n], np.int64))[:, 0]
            return bool((counts <= np.array(sizes)).all())

        low, high = 0, sum(sizes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The same proportions in the smallest whole numbers: 0.7, 0.2, 0.1 -> 7, 2, 1."""
    bad = [weight for weight in weights if not 0 <= weight < float("inf")]
    if bad or not any(weights):
        raise DataError(
            f"weights {list(weights)} must be numbers of 0 or more, and not all of them 0"
        )
    parts = [
        Fraction(str(weight)) for weight in weights
    ]  # 0.1 is a tenth, not the float next to it
    scale = np.lcm.reduce([part.denominator for part in parts], dtype=object)
    whole = [int(part * scale) for part in parts]
    common = int(np.gcd.reduce(whole, dtype=object))
    if sum(whole) // common > LARGEST_SUM:
        raise DataError(
            f"weights {list(weights)} are {sum(whole) // common:,} parts of a whole, and "
            f"{LARGEST_SUM:,} are counted exactly: round them to four digits or so"
        )
    return [weight // common for weight in whole]


def phases(
    names: Sequence[str],
    first: Mapping[str, float],
    changes: Sequence[tuple[int, Mapping[str, float]]],
    sequence_length: int,
) -> list[Phase]:
    """Phases for `names` from weights by name; `changes` are (token count, weights).

    A change takes effect with the first sample that begins at or after its token count. Sources it
    does not name keep their weight.
    """
    weights = dict(first)
    found = [Phase(0, tuple(weights[name] for name in names))]
    for tokens, changed in changes:
        unknown = sorted(set(changed) - set(names))
        if unknown:
            raise DataError(
                f"the weights from token {tokens:,} on name {', '.join(unknown)}; the sources are "
                f"{', '.join(names)}"
            )
        weights |= changed
        start = -(-tokens // sequence_length)
        found.append(Phase(start, tuple(weights[name] for name in names)))
    return found


def _counts(weights: Sequence[int], n: NDArray[np.int64]) -> NDArray[np.int64]:
    """[K, len(n)]: how many of `n` places each weight has had; sums to `n`."""
    if len(weights) == 1:
        return n[None]
    middle = len(weights) // 2
    left, both = sum(weights[:middle]), max(sum(weights), 1)
    share = (n * left + both // 2) // both
    return np.concatenate([_counts(weights[:middle], share), _counts(weights[middle:], n - share)])
