"""Files of token ids as one line of tokens, memory-mapped."""

import functools
import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.ahead import ReadAhead

# an open map holds a file descriptor, of which a process has 1024 by default
OPEN_MAPS = 256


class DataError(ValueError):
    """Data that cannot be trained on, said in one sentence."""


@dataclass(frozen=True)
class Piece:
    """`tokens` ids of `dtype` in a file, from byte `offset` on."""

    path: Path
    dtype: np.dtype[Any]
    tokens: int
    offset: int = 0


class Files(Protocol):
    """Where pieces come from: this machine's disk (ahead.py) or a network (fetch.py)."""

    # called after files were let go, so that maps of them do not keep their space on the disk
    on_release: Callable[[], None] | None

    def path(self, index: int) -> Path:
        """Of piece `index`, once it is here; DataError where it cannot be had."""

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Pieces that are read now and after that; begins to bring them, does not wait."""

    def close(self) -> None:
        """End what `need` began and let go of all files."""


class _Map(NamedTuple):
    memory: mmap.mmap
    ids: NDArray[Any]


class MappedTokens:
    """`dataset.ShardedDataset` but for the vocabulary."""

    def __init__(self, name: str, pieces: Sequence[Piece], files: Files | None = None) -> None:
        """files: brings pieces; None: they are where their paths say."""
        self.name, self.pieces = name, pieces
        self.files = files or ReadAhead([piece.path for piece in pieces])
        self._starts = [0]  # token at which each piece begins
        for piece in pieces:
            self._starts.append(self._starts[-1] + piece.tokens)
        self.tokens = self._starts[-1]
        # thread-safe, and a bound on file descriptors
        self._map = functools.lru_cache(maxsize=OPEN_MAPS)(self._open)
        self.files.on_release = self._map.cache_clear

    @property
    def sections(self) -> list[tuple[int, int]]:
        """First token of each piece and the one after its last."""
        return list(zip(self._starts[:-1], self._starts[1:], strict=True))

    def map(self, index: int) -> NDArray[Any]:
        """All ids of one piece."""
        return self._map(index).ids

    def _open(self, index: int) -> _Map:
        piece = self.pieces[index]
        with self.files.path(index).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # np.memmap would do this too, and indexing it is ten times slower
        return _Map(memory, np.frombuffer(memory, piece.dtype, piece.tokens, piece.offset))

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] from token `start`: a view inside one file, a copy across files."""
        stop = start + length
        if start < 0 or length < 0 or stop > self.tokens:
            raise DataError(
                f"tokens {start:,} to {stop:,} were asked of {self.name}, which has {self.tokens:,}"
            )
        index, offset = self._place(start)
        if offset + length <= self.pieces[index].tokens:
            return self.map(index)[offset : offset + length]
        parts = []
        while length:
            part = self.map(index)[offset : offset + length]
            parts.append(part)
            index, offset, length = index + 1, 0, length - len(part)
        return np.concatenate(parts)

    def advise(self, start: int, length: int) -> None:
        """Begin to read these tokens from the disk, without waiting.

        Of a cold disk, a batch announced row by row is read with many requests at a time instead of
        one after the other. What lies behind the end of a file is left out.
        """
        index, offset = self._place(start)
        piece, memory = self.pieces[index], self._map(index).memory
        first = piece.offset + offset * piece.dtype.itemsize
        stop = min(first + length * piece.dtype.itemsize, len(memory))
        first -= first % mmap.PAGESIZE
        memory.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Pieces that are read now and after that."""
        self.files.need(now, soon)

    def close(self) -> None:
        """End what is brought, and a read that waits for it."""
        self.files.close()

    def _place(self, start: int) -> tuple[int, int]:
        """Piece of token `start` and where it lies there."""
        index = bisect_right(self._starts, start, hi=len(self.pieces)) - 1
        return index, start - self._starts[index]
