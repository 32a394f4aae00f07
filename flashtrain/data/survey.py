"""What a data set holds: lengths of its documents, ids it uses. One pass, in bounded memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.dataset import CHUNK, Dataset

BUCKETS = 48  # documents of 0, 1, 2 - 3, 4 - 7, .. tokens


@dataclass(frozen=True)
class Survey:
    tokens: int
    documents: int  # ended by the separator; one that the last token cuts off is not counted
    lengths: NDArray[np.int64]  # [BUCKETS] documents by the bit length of their tokens
    length_sum: int  # of those documents, separators not counted
    shortest: int
    longest: int
    counts: NDArray[np.int64]  # [vocabulary] how often each id occurs

    @property
    def used_ids(self) -> int:
        return int((self.counts > 0).sum())


def survey(dataset: Dataset, end_of_text: int | None, limit: int | None = None) -> Survey:
    """Over the first `limit` tokens; without a separator there are no documents."""
    tokens = dataset.tokens if limit is None else min(limit, dataset.tokens)
    counts = np.zeros(dataset.vocabulary, np.int64)
    lengths = np.zeros(BUCKETS, np.int64)
    documents = length_sum = longest = begun = 0  # begun: where the current document starts
    shortest = tokens
    for start in range(0, tokens, CHUNK):
        ids = dataset.read(start, min(CHUNK, tokens - start))
        counts += np.bincount(ids.astype(np.int64, copy=False), minlength=dataset.vocabulary)
        if end_of_text is None:
            continue
        ends = np.flatnonzero(ids == end_of_text) + start
        if not len(ends):
            continue
        own = np.diff(ends, prepend=begun - 1) - 1
        begun = int(ends[-1]) + 1
        lengths += np.bincount(bit_length(own), minlength=BUCKETS)
        documents += len(own)
        length_sum += int(own.sum())
        shortest, longest = min(shortest, int(own.min())), max(longest, int(own.max()))
    return Survey(
        tokens, documents, lengths, length_sum, shortest if documents else 0, longest, counts
    )


def bit_length(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 to 7 -> 3, ..; exact below 2^53."""
    found: NDArray[np.int64] = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    return found


def histogram(lengths: NDArray[np.int64], width: int = 50) -> list[str]:
    """Lines of a bar chart, one a bucket that lies between used ones."""
    used = np.flatnonzero(lengths)
    if not len(used):
        return []
    lines = []
    for bits in range(int(used[0]), int(used[-1]) + 1):
        low, high = (1 << bits) >> 1, (1 << bits) - 1
        bar = "█" * round(width * int(lengths[bits]) / int(lengths.max()))
        span = f"{low:,}" if low >= high else f"{low:,} - {high:,}"
        lines.append(f"{span:>23}  {int(lengths[bits]):>13,}  {bar}")
    return lines


def documents_of(ids: NDArray[np.int64], end_of_text: int | None) -> list[NDArray[np.int64]]:
    """`ids` [n] cut behind every separator; the last part may be of no length."""
    if end_of_text is None:
        return [ids]
    return np.split(ids, np.flatnonzero(ids == end_of_text) + 1)
