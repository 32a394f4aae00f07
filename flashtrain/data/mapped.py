"""Files of token ids as one line of tokens, memory-mapped."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


class MappedTokens:
    def __init__(self, name: str, pieces: Sequence[Piece]) -> None:
        self.name, self.pieces = name, pieces
        self._starts = [0]  # token at which each piece begins
        for piece in pieces:
            self._starts.append(self._starts[-1] + piece.tokens)
        self.tokens = self._starts.pop()
        # thread-safe, and a bound on file descriptors
        self.map = functools.lru_cache(maxsize=OPEN_MAPS)(self._open)

    def _open(self, index: int) -> NDArray[Any]:
        """All ids of one piece."""
        piece = self.pieces[index]
        ids = np.memmap(piece.path, piece.dtype, "r", piece.offset, (piece.tokens,))
        return np.asarray(ids)  # indexing np.memmap itself is ten times slower

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] from token `start`: a view inside one file, a copy across files."""
        stop = start + length
        if start < 0 or length < 0 or stop > self.tokens:
            raise DataError(
                f"tokens {start:,} to {stop:,} were asked of {self.name}, which has {self.tokens:,}"
            )
        index = bisect_right(self._starts, start) - 1
        offset = start - self._starts[index]
        if offset + length <= self.pieces[index].tokens:
            return self.map(index)[offset : offset + length]
        parts = []
        while length:
            part = self.map(index)[offset : offset + length]
            parts.append(part)
            index, offset, length = index + 1, 0, length - len(part)
        return np.concatenate(parts)
