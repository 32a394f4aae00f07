from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data import packing
from flashtrain.data.mapped import DataError
from flashtrain.data.packing import PackedDocuments, best_fit, open_plan, pieces_of
from flashtrain.data.samples import DOCUMENTS, IGNORED, LABELS, TOKENS, Blocks, Samples

END = 0
DOCUMENT_LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=40).filter(
    lambda lengths: sum(lengths) > 1
)


class Ids:
    name, vocabulary = "ids", 1 << 20

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, np.uint32)
        self.tokens = len(ids)

    def advise(self, start: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
        assert 0 <= start <= start + length <= self.tokens
        return self.ids[start : start + length]


def corpus(lengths: list[int], separator_first: bool = False) -> Ids:
    """Documents of 1, 2, 3, ... going on from one to the next, a separator behind each."""
    ids, at = [END] * separator_first, 1
    for length in lengths:
        ids += [*range(at, at + length), END]
        at += length
    return Ids(ids)


def whole(samples: Samples) -> np.ndarray[Any, Any]:
    block = np.full((3, samples.n_samples, samples.sequence_length), -7, np.int64)
    samples.fill(np.arange(samples.n_samples), block)
    return block


def learned_pairs(block: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    tokens, labels, _ = block.reshape(3, -1)
    kept = labels != IGNORED
    return sorted(zip(tokens[kept].tolist(), labels[kept].tolist(), strict=True))


def check_rows(block: np.ndarray[Any, Any]) -> None:
    """Within a document every label is the next token; nothing goes on over its end."""
    for tokens, labels, documents in block.transpose(1, 0, 2):
        assert documents[0] == 0 and set(np.diff(documents).tolist()) <= {0, 1}
        for document in range(documents[-1] + 1):
            own = documents == document
            inside, ahead = tokens[own], labels[own]
            if (ahead == IGNORED).all():
                assert (inside == END).all() and document == documents[-1]  # padding
                continue
            np.testing.assert_array_equal(inside[1:], ahead[:-1])
            assert (inside[1:] != END).all()  # a separator only begins a document


@given(lengths=DOCUMENT_LENGTHS, T=st.integers(2, 17), separator_first=st.booleans())
@settings(max_examples=150, deadline=None)
def test_best_fit_learns_every_token_once(
    lengths: list[int], T: int, separator_first: bool
) -> None:
    data = corpus(lengths, separator_first)
    plan = best_fit(pieces_of(data, T, END), T)
    block = whole(PackedDocuments(data, T, END, plan))
    check_rows(block)
    ids = data.ids.tolist()
    assert learned_pairs(block) == sorted(pairwise(ids))
    # no document is cut that fits, and those that do not are cut every T
    starts, sizes = plan.starts, plan.lengths
    begins = {0, *np.flatnonzero(data.ids == END).tolist()}
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        if start not in begins:
            assert sizes[starts == start - T] == T
        assert 1 <= size <= T


@given(lengths=DOCUMENT_LENGTHS, T=st.integers(2, 17))
@settings(max_examples=100, deadline=None)
def test_concatenation_learns_every_token_once(lengths: list[int], T: int) -> None:
    data = corpus(lengths)
    if data.tokens <= T:
        return
    blocks = Blocks(data, T, END)
    block = whole(blocks)
    check_rows(block)
    n = blocks.n_samples * T
    ids = data.ids.tolist()
    assert block[TOKENS].flatten().tolist() == ids[:n]
    assert block[LABELS].flatten().tolist() == ids[1 : n + 1]


def test_best_fit_is_what_its_name_says() -> None:
    lengths = np.array([5, 3, 8, 2, 6, 1, 4, 2], np.int32)
    plan = best_fit((np.arange(8, dtype=np.int64) * 10, lengths), 8)
    rows = [plan.lengths[a:b].tolist() for a, b in pairwise(plan.rows)]
    # 8 | 6, then the 5, the 4: 3 joins the 5, 2 the 6, 2 the 4, 1 the room of 2 beside it
    assert rows == [[8], [6, 2], [5, 3], [4, 2, 1]]
    assert plan.starts[:3].tolist() == [20, 40, 30]


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_best_fit_wastes_little(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.lognormal(4, 1, 3000).astype(np.int64), 400).tolist()
    data = corpus([int(length) for length in lengths])
    plan = best_fit(pieces_of(data, 512, END), 512)
    padding = 1 - plan.lengths.sum() / (512 * (len(plan.rows) - 1))
    assert padding < 0.01
    assert (np.add.reduceat(plan.lengths, plan.rows[:-1]) <= 512).all()


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_pieces_do_not_depend_on_how_the_data_are_read(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = corpus([3, 0, 17, 40, 1, 8])
    starts, lengths = pieces_of(data, 10, END)
    monkeypatch.setattr(packing, "CHUNK", chunk)
    again = pieces_of(data, 10, END)
    np.testing.assert_array_equal(again[0], starts)
    np.testing.assert_array_equal(again[1], lengths)


def test_a_plan_is_made_once_and_only_for_what_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = corpus([3, 9, 17, 40, 1, 8])
    plan = open_plan(data, 10, END, tmp_path)
    other = open_plan(corpus([3, 9, 18, 39, 1, 8]), 10, END, tmp_path)
    open_plan(data, 11, END, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert plan.lengths.tolist() != other.lengths.tolist()
    monkeypatch.setattr(packing, "best_fit", None)  # must not be needed again
    again = open_plan(data, 10, END, tmp_path)
    for one, two in zip(plan, again, strict=True):
        np.testing.assert_array_equal(one, two)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match="has 1 tokens: too few to learn from"):
        pieces_of(Ids([5]), 10, END)
    assert DOCUMENTS == 2
