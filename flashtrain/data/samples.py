"""Sequences to train on by their number: out of one data set, in its order, shuffled, or mixed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.dataset import Dataset
from flashtrain.data.mapped import DataError
from flashtrain.data.mixture import Mix
from flashtrain.data.sampler import sample_index

TOKENS, LABELS, DOCUMENTS = range(3)  # rows of what `fill` fills
IGNORED = -100  # the label of a token that is not learned from, as in torch and parallel/loss.py


class Samples(Protocol):
    """Sequence i is the same whoever asks for it, and whenever."""

    name: str
    sequence_length: int
    packed: bool  # whether documents are kept apart, so that DOCUMENTS is filled too
    n_samples: int  # after which they repeat; of a mixture, of all its sources together

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        """block [2 or 3, n, T]: tokens, labels, and if packed the document each token is of.

        Documents are numbered from 0 in each sequence. A label is the next token in the data, that
        of a document's last token the separator, or IGNORED.
        """
        ...

    def close(self) -> None:
        """End what is read or fetched ahead, and a `fill` that waits for it."""
        ...


class Blocks:
    """Sequences of T tokens that lie end to end in the data, each with the token after it.

    Packed, a document begins with the end-of-text token before it: text is learned from a separator
    on, as it is generated later, and every label is kept. What a block cuts goes on in the next
    block as a document of its own.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        end_of_text: int | None = None,
        sections: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """end_of_text: the id that separates documents keeps them apart; None runs them together.

        sections: (first token, the one after the last) of parts that no sequence spans; None: one.
        Raises DataError where the data are shorter than one sequence.
        """
        self.dataset, self.sequence_length = dataset, sequence_length
        self.name, self.end_of_text = dataset.name, end_of_text
        self.packed = end_of_text is not None
        self.n_samples = count_samples(dataset, sequence_length)
        parts = np.array(sections or [(0, dataset.tokens)], np.int64)
        self.counts = np.maximum(parts[:, 1] - parts[:, 0] - 1, 0) // sequence_length  # [sections]
        self._firsts = self.counts.cumsum() - self.counts  # sequences before each section
        self._begins = parts[:, 0]
        if sections is not None:
            self.n_samples = int(self.counts.sum())

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        T = self.sequence_length
        section = np.searchsorted(self._firsts, numbers, side="right") - 1
        starts = (self._begins[section] + (numbers - self._firsts[section]) * T).tolist()
        for start in starts:
            self.dataset.advise(start, T + 1)
        for row, start in enumerate(starts):
            ids = self.dataset.read(start, T + 1)
            block[TOKENS, row], block[LABELS, row] = ids[:-1], ids[1:]
        if self.packed:
            block[DOCUMENTS] = number_documents(block[TOKENS], self.end_of_text)

    def close(self) -> None:
        self.dataset.close()


def number_documents(tokens: NDArray[np.int64], end_of_text: int | None) -> NDArray[np.int64]:
    """[n, T] -> the document each token is of: 0, 0, .., 1, ..; a separator begins one."""
    begins = tokens == end_of_text
    begins[:, 0] = False  # the first is number 0 either way
    documents: NDArray[np.int64] = begins.cumsum(1, dtype=np.int64)
    return documents


class Shuffled:
    """Epoch after epoch of the same sequences, each in its own order."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.name, self.sequence_length = samples.name, samples.sequence_length
        self.packed, self.n_samples = samples.packed, samples.n_samples

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        self.samples.fill(sample_index(self.seed, numbers, self.n_samples), block)

    def close(self) -> None:
        self.samples.close()


class Mixture:
    """Named sources in the proportions of a `Mix`; each goes on where it stopped."""

    def __init__(self, sources: dict[str, Samples], mix: Mix, *, endless: bool = True) -> None:
        """endless: sources start again when they end, as `Shuffled` ones do; otherwise the mixture
        ends with the first one that does."""
        self.sources, self.mix = sources, mix
        first = next(iter(sources.values()))
        self.name = f"the mixture of {', '.join(sources)}"
        self.sequence_length, self.packed = first.sequence_length, first.packed
        sizes = [source.n_samples for source in sources.values()]
        self.n_samples = sum(sizes) if endless else mix.longest(sizes)

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        which, own = self.mix.place(numbers)
        for k, source in enumerate(self.sources.values()):
            rows = np.flatnonzero(which == k)
            if len(rows):
                part = np.empty((len(block), len(rows), block.shape[2]), np.int64)
                source.fill(own[rows], part)
                block[:, rows] = part

    def close(self) -> None:
        for source in self.sources.values():
            source.close()

    def counters(self, n_samples: int) -> dict[str, float]:
        """Tokens and epochs of each source among the first `n_samples` sequences."""
        counts = self.mix.counts(np.array([n_samples], np.int64))[:, 0].tolist()
        found: dict[str, float] = {}
        for (name, source), count in zip(self.sources.items(), counts, strict=True):
            found[f"data/tokens/{name}"] = count * self.sequence_length
            found[f"data/epochs/{name}"] = count / source.n_samples
        return found


def count_samples(dataset: Dataset, sequence_length: int) -> int:
    """Blocks of `sequence_length` tokens in `dataset`, each with a token after it; at least 1."""
    n_samples = (dataset.tokens - 1) // sequence_length
    if n_samples < 1:
        raise DataError(
            f"{dataset.name} has {dataset.tokens:,} tokens and one sequence needs "
            f"{sequence_length + 1:,}: set a smaller data.sequence_length or prepare more text"
        )
    return n_samples
