"""Documents packed into sequences of T tokens so that as few as possible are cut.

Best fit (Ding et al. 2024, arXiv:2404.10830): a document longer than T is cut into pieces of T and
a rest; then pieces, the longest first, go into the fullest sequence that still has room for them.
What is left over at the end of a sequence is padding that nothing is learned from.

A document begins with the separator before it, as in `samples.Blocks`. Which pieces lie in which
sequence is worked out once, by one pass over the tokens, and kept in a folder: about 12 bytes a
piece, memory-mapped by every reader.
"""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashtrain.data.dataset import CHUNK, Dataset
from flashtrain.data.mapped import DataError
from flashtrain.data.samples import DOCUMENTS, IGNORED, LABELS, TOKENS

LOOKS, LOOK = 16, 1 << 12  # tokens that tell a data set from another one of the same size


class Plan(NamedTuple):
    """Sequence i is made of the pieces rows[i] to rows[i + 1] - 1, in this order."""

    starts: NDArray[np.int64]  # [pieces] token of the data set at which each begins
    lengths: NDArray[np.int32]  # [pieces]
    rows: NDArray[np.int64]  # [sequences + 1]
    counts: NDArray[np.int64]  # [sections] sequences made of each one's tokens, in order


class PackedDocuments:
    """`Samples` of a plan: pieces, each a document of its own, then padding."""

    packed = True

    def __init__(
        self, dataset: Dataset, sequence_length: int, end_of_text: int, plan: Plan
    ) -> None:
        self.dataset, self.sequence_length = dataset, sequence_length
        self.name, self.end_of_text, self.plan = dataset.name, end_of_text, plan
        self.counts = plan.counts
        self.n_samples = len(plan.rows) - 1

    def fill(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> None:
        starts, lengths, rows, _ = self.plan
        spans = [(int(rows[number]), int(rows[number + 1])) for number in numbers.tolist()]
        for first, stop in spans:
            for piece in range(first, stop):
                self.dataset.advise(int(starts[piece]), int(lengths[piece]) + 1)
        for row, (first, stop) in enumerate(spans):
            at = 0
            pieces = zip(starts[first:stop].tolist(), lengths[first:stop].tolist(), strict=True)
            for document, (start, length) in enumerate(pieces):
                ids = self.dataset.read(start, length + 1)
                block[TOKENS, row, at : at + length] = ids[:-1]
                block[LABELS, row, at : at + length] = ids[1:]
                block[DOCUMENTS, row, at : at + length] = document
                at += length
            block[TOKENS, row, at:] = self.end_of_text
            block[LABELS, row, at:] = IGNORED
            block[DOCUMENTS, row, at:] = stop - first

    def close(self) -> None:
        self.dataset.close()


def open_plan(
    dataset: Dataset,
    sequence_length: int,
    end_of_text: int,
    folder: Path,
    sections: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """The plan in `folder`, made there if it is not; several processes may ask at once.

    sections: (first token, the one after the last) of parts that no sequence spans; None: one.
    """
    place = folder / f"packing-{_mark(dataset, sequence_length, end_of_text, sections)}"
    if not place.is_dir():
        plan = best_fit_of_each(dataset, sequence_length, end_of_text, sections)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{place.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        for name, array in plan._asdict().items():
            np.save(partial / f"{name}.npy", array)
        try:
            partial.rename(place)
        except OSError:
            shutil.rmtree(partial)
            if not place.is_dir():  # otherwise another process was first
                raise
    return Plan(
        *(
            np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in Plan._fields
        )
    )


def best_fit_of_each(
    dataset: Dataset,
    sequence_length: int,
    end_of_text: int,
    sections: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """The plans of all sections, one behind the other; None: the data set is one."""
    plans = []
    for section in [None] if sections is None else sections:
        pieces = pieces_of(dataset, sequence_length, end_of_text, section)
        plans.append(best_fit(pieces, sequence_length))
    sizes = np.array([0, *(len(plan.starts) for plan in plans)]).cumsum()
    rows = [plan.rows[:-1] + before for plan, before in zip(plans, sizes, strict=False)]
    return Plan(
        np.concatenate([plan.starts for plan in plans]),
        np.concatenate([plan.lengths for plan in plans]),
        np.append(np.concatenate(rows), sizes[-1]),
        np.concatenate([plan.counts for plan in plans]),
    )


def pieces_of(
    dataset: Dataset,
    sequence_length: int,
    end_of_text: int,
    section: tuple[int, int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(starts, lengths) of every document, cut where it is longer than a sequence.

    A piece of n tokens has the n tokens after its first one as labels. One pass. section: the
    tokens (first, the one after the last) that are looked at; none has a label outside it.
    """
    begin, stop = section or (0, dataset.tokens)
    last = stop - 1  # has no label
    found = [np.array([begin], np.int64)]
    for start in range(begin, stop, CHUNK):
        ids = dataset.read(start, min(CHUNK, stop - start))
        found.append(np.flatnonzero(ids == end_of_text) + start)
    begins = np.unique(np.concatenate(found))  # the first may be a separator itself
    begins = begins[begins < last]
    if not len(begins) and section is None:
        raise DataError(f"{dataset.name} has {dataset.tokens:,} tokens: too few to learn from")
    sizes = np.diff(begins, append=last)
    parts = -(-sizes // sequence_length)  # pieces of each document, >= 1
    number = np.arange(parts.sum()) - np.repeat(parts.cumsum() - parts, parts)
    starts = np.repeat(begins, parts) + number * sequence_length
    lengths = np.minimum(np.repeat(sizes, parts) - number * sequence_length, sequence_length)
    return starts, lengths.astype(np.int32)


def best_fit(pieces: tuple[NDArray[np.int64], NDArray[np.int32]], sequence_length: int) -> Plan:
    """Best fit, longest first; among equals the first in the data, so the plan is always the same.

    Each piece looks up the smallest sufficient room in a bit set of rooms: T / 64 steps.
    """
    starts, lengths = pieces
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = [[] for _ in range(sequence_length + 1)]  # room -> its sequences
    rooms = 0  # bit r is set where bins[r] has a sequence
    n_rows = 0
    row_of = np.empty(len(order), np.int64)
    for place, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = bins[room].pop()
            if not bins[room]:
                rooms ^= 1 << room
        else:
            room, row = sequence_length, n_rows
            n_rows += 1
        row_of[place] = row
        if left := room - length:
            bins[left].append(row)
            rooms |= 1 << left
    by_row = np.argsort(row_of, kind="stable")
    order = order[by_row]
    rows = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=n_rows), out=rows[1:])
    return Plan(starts[order], lengths[order], rows, np.array([n_rows], np.int64))


def _mark(
    dataset: Dataset,
    sequence_length: int,
    end_of_text: int,
    sections: Sequence[tuple[int, int]] | None,
) -> str:
    """Of what a plan depends on; of the tokens, a few looks at them."""
    sizes = (dataset.tokens, sequence_length, end_of_text, sections)
    found = xxhash.xxh3_64(repr(sizes).encode())
    for start in np.linspace(0, dataset.tokens, LOOKS, endpoint=False, dtype=np.int64).tolist():
        ids = dataset.read(start, min(LOOK, dataset.tokens - start))
        found.update(ids.astype("<u4").tobytes())
    return found.hexdigest()
