from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data import corpus
from flashtrain.data.split import (
    TRAIN,
    VALIDATION,
    cut_document,
    held_out,
    part_size,
    split_document,
)


@given(text=st.text(alphabet="ab \n漢", max_size=400), part=st.integers(8, 60))
@settings(max_examples=200, deadline=None)
def test_parts_put_together_are_the_document(text: str, part: int) -> None:
    parts = list(cut_document(text, part))
    assert "".join(parts) == text
    assert all(part // 2 <= len(piece) <= part + part // 2 for piece in parts[:-1])
    assert len(parts[-1]) <= part + part // 2
    assert "".join(piece for _, piece in split_document(text, 0.3, part)) == text


def test_cuts_stand_at_the_largest_break() -> None:
    text = "one two\nthree four\n\nfive six\nseven eight nine ten eleven"
    assert next(cut_document(text, 30)) == "one two\nthree four\n\n"
    assert next(cut_document("a line\n" * 10, 25)) == "a line\n" * 3
    assert next(cut_document("word " * 20, 23)) == "word " * 4
    assert list(cut_document("x" * 50, 20)) == ["x" * 20, "x" * 30]


def test_neighbours_on_one_side_stay_one_piece() -> None:
    text = "".join(f"line {i}\n" for i in range(5000))
    sides = [side for side, _ in split_document(text, 0.2, 100)]
    assert all(one != other for one, other in pairwise(sides))
    assert list(split_document(text, 0.0, 100)) == [(TRAIN, text)]


def test_a_short_document_is_never_cut() -> None:
    text = "a paragraph\n\nanother one"
    assert len(list(split_document(text, 0.5, 1024))) == 1
    assert part_size(100) == 1024
    assert part_size(10 << 30) == 20 << 20  # of a large corpus, no usual document is cut


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_the_share_held_out_is_the_one_asked_for(share: float) -> None:
    n = 20_000
    found = sum(held_out(f"document {i}", share) for i in range(n)) / n
    assert abs(found - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_held_out_grows_with_the_share_and_depends_on_the_text_alone() -> None:
    texts = [f"document {i}" for i in range(2000)]
    few = {text for text in texts if held_out(text, 0.05)}
    more = {text for text in reversed(texts) if held_out(text, 0.1)}
    assert few < more


def test_five_percent_of_the_plays_are_held_out_and_not_trained_on() -> None:
    works = [text for _, text in corpus.documents()]
    part = part_size(sum(map(len, works)))
    pieces = [piece for work in works for piece in split_document(work, 0.05, part)]
    size = {side: sum(len(text) for s, text in pieces if s == side) for side in (TRAIN, VALIDATION)}
    assert 0.045 < size[VALIDATION] / sum(size.values()) < 0.055
    train = "\n".join(text for side, text in pieces if side == TRAIN)
    for side, text in pieces:
        if side == VALIDATION:
            assert text[1000:1400] not in train
