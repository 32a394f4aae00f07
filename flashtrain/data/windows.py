"""An order that needs few shards at a time: shards shuffled, then sequences within some of them.

Each epoch puts the shards into an order of its own and takes `window` of them at a time; the
sequences of those are shuffled together, and none comes from another shard. So a machine holds two
windows, the one it reads and the next one, however large the data are. As in sampler.py, all is
computed from (seed, epoch, position): any position is found without those before it, and what is
remembered is one number a shard.
"""

import functools
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.dataset import ShardedDataset
from flashtrain.data.mapped import DataError
from flashtrain.data.sampler import derived_seed, sample_index
from flashtrain.data.samples import Samples

# a remote shard in reach holds two file descriptors, and a process has 1024 by default
LARGEST_WINDOW = 64


class SectionSamples(Samples, Protocol):
    """Sequences of a sharded data set, those of its first shard first; none spans two."""

    counts: NDArray[np.int64]  # [shards]


class _Epoch(NamedTuple):
    number: int
    shards: NDArray[np.int64]  # in the order of this epoch
    ends: NDArray[np.int64]  # [windows] sequences up to and with each window


class WindowShuffled:
    """Epoch after epoch of the same sequences, `window` shards at a time."""

    def __init__(
        self, samples: SectionSamples, dataset: ShardedDataset, seed: int, window: int
    ) -> None:
        """dataset: that of `samples`, which is told what is needed.

        Raises DataError where no shard holds a sequence.
        """
        self.samples, self.dataset, self.seed, self.window = samples, dataset, seed, window
        self.name, self.sequence_length = samples.name, samples.sequence_length
        self.packed, self.n_samples = samples.packed, samples.n_samples
        self._counts = np.asarray(samples.counts)
        self._firsts = self._counts.cumsum() - self._counts
        self._used = np.flatnonzero(self._counts)
        if not len(self._used):
            raise DataError(
                f"no shard of {self.name} holds a sequence of {self.sequence_length} tokens: "
                "set a smaller data.sequence_length or leave data.shuffle_shards null"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._open_epoch)

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        """`numbers` ascend."""
        at = 0
        while at < len(numbers):
            epoch, offset = divmod(int(numbers[at]), self.n_samples)
            order = self._epoch(epoch)
            window = int(np.searchsorted(order.ends, offset, side="right"))
            stop = epoch * self.n_samples + int(order.ends[window])
            upto = at + int(np.searchsorted(numbers[at:], stop))
            self.dataset.need(self.shards(epoch, window), self._after(epoch, window))
            place = numbers[at:upto] - epoch * self.n_samples
            self.samples.fill(self._find(order, window, place), block[:, at:upto])
            at = upto

    def close(self) -> None:
        self.samples.close()

    def shards(self, epoch: int, window: int) -> list[int]:
        """Which a window needs."""
        found: list[int] = self._epoch(epoch).shards[self._slice(window)].tolist()
        return found

    def _after(self, epoch: int, window: int) -> list[int]:
        last = window + 1 == len(self._epoch(epoch).ends)
        return self.shards(epoch + 1, 0) if last else self.shards(epoch, window + 1)

    def _slice(self, window: int) -> slice:
        return slice(window * self.window, (window + 1) * self.window)

    def _open_epoch(self, number: int) -> _Epoch:
        n = len(self._used)
        places = np.arange(n, dtype=np.int64) + number * n
        shards = self._used[sample_index(derived_seed(self.seed, "shards"), places, n)]
        ends = self._counts[shards].cumsum()[self.window - 1 :: self.window]
        if n % self.window:
            ends = np.append(ends, self.n_samples)
        return _Epoch(number, shards, ends)

    def _find(self, order: _Epoch, window: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sequences at `places` of an epoch, all in one window."""
        shards = order.shards[self._slice(window)]
        counts = self._counts[shards]
        ends = counts.cumsum()
        inside = places - (order.ends[window] - ends[-1])
        drawn = sample_index(
            derived_seed(self.seed, f"window {window} of epoch {order.number}"),
            inside,
            int(ends[-1]),
        )
        which = np.searchsorted(ends, drawn, side="right")
        found: NDArray[np.int64] = (
            self._firsts[shards[which]] + drawn - (ends[which] - counts[which])
        )
        return found
