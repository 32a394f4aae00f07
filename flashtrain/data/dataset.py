"""What a line of token ids is, wherever it lies: the protocol, a part of one, one made up."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.mapped import DataError
from flashtrain.data.sampler import splitmix64

CHUNK = 1 << 24  # tokens that full passes take at a time: 64 MiB at most


class Dataset(Protocol):
    """A line of `tokens` token ids, read anywhere."""

    name: str  # for messages
    tokens: int
    vocabulary: int  # ids are in [0, vocabulary)

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] from `start`, of any unsigned dtype; maybe a read-only view."""

    def advise(self, start: int, length: int) -> None:
        """These will be read at once: where that takes a disk, begin, without waiting."""

    def close(self) -> None:
        """End what is read or fetched ahead, and a read that waits for it."""


class ShardedDataset(Dataset, Protocol):
    """One that lies in several files."""

    @property
    def sections(self) -> list[tuple[int, int]]:
        """First token of each file and the one after its last."""

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Files that are read now and after that; begins to bring them, does not wait."""


class Part:
    """Tokens `start` to `stop` of another data set."""

    def __init__(self, whole: ShardedDataset, start: int, stop: int) -> None:
        if not 0 <= start < stop <= whole.tokens:
            raise DataError(
                f"tokens {start:,} to {stop:,} are no part of {whole.name}, which has "
                f"{whole.tokens:,}: hold fewer tokens out"
            )
        self.whole, self.start, self.tokens = whole, start, stop - start
        self.name, self.vocabulary = f"a part of {whole.name}", whole.vocabulary

    def read(self, start: int, length: int) -> NDArray[Any]:
        if not 0 <= start <= start + length <= self.tokens:
            raise DataError(
                f"tokens {start:,} to {start + length:,} were asked of {self.name}, which has "
                f"{self.tokens:,}"
            )
        return self.whole.read(self.start + start, length)

    def advise(self, start: int, length: int) -> None:
        self.whole.advise(self.start + start, length)

    @property
    def sections(self) -> list[tuple[int, int]]:
        """Of all files of the whole; those outside the part have no tokens here."""
        clip = [(min(max(t - self.start, 0), self.tokens) for t in s) for s in self.whole.sections]
        return [(first, stop) for first, stop in clip]

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        self.whole.need(now, soon)

    def close(self) -> None:
        self.whole.close()


class RandomTokens:
    """Uniform ids without a file: token i is a hash of (seed, i), so every reader sees the same."""

    def __init__(self, vocabulary: int, seed: int, tokens: int = 1 << 40) -> None:
        if vocabulary < 1:
            raise DataError(f"random tokens need a vocabulary of at least 1, got {vocabulary}")
        self.name = f"random tokens of seed {seed}"
        self.vocabulary = vocabulary
        self.tokens = tokens
        self._key = splitmix64(np.uint64(seed & ((1 << 64) - 1)))

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] uint32."""
        where = np.arange(start, start + length, dtype=np.uint64)
        return (splitmix64(where ^ self._key) % np.uint64(self.vocabulary)).astype(np.uint32)

    def advise(self, start: int, length: int) -> None:
        pass  # nothing lies anywhere

    def close(self) -> None:
        pass
