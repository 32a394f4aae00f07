"""Boxes against plain slicing: every value of a shard, at its place in the whole, once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtrain.model.shard import Box, Piece, Shard, Span, owned_rows, whole


def place(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))


def check(full: Tensor, local: Tensor, pieces: tuple[Piece, ...], first: int, last: int) -> None:
    """`local`: what `pieces` take of `full`; values `first` to `last` of it are held."""
    span = Span(tuple(local.shape), first, last - first)
    memory = local.reshape(-1)[first:last].clone()
    found = Shard(tuple(full.shape), pieces, span).boxes
    seen = [value for box in found for value in box.view(memory).flatten().tolist()]
    assert sorted(seen) == sorted(memory.tolist())
    for box in found:
        assert torch.equal(box.view(memory), full[place(box)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_span_of_the_whole(shape: list[int], data: st.DataObject) -> None:
    full = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    first = data.draw(st.integers(0, full.numel()))
    last = data.draw(st.integers(first, full.numel()))
    check(full, full, whole(full.shape).pieces, first, last)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 25), st.integers(0, 25))
def test_a_span_of_slabs(one: int, other: int) -> None:
    full = torch.arange(60).view(12, 5)
    first, last = sorted((one, other))
    rows = (Piece(0, 0, 2, 3, True), Piece(0, 3, 8, 2, True))
    check(full, torch.cat([full[2:5], full[8:10]]), rows, first, last)
    columns = (Piece(1, 0, 1, 2, True),)
    check(full, full[:, 1:3].contiguous(), columns, min(first, 24), min(last, 24))


def test_owned_is_what_both_cuts_own() -> None:
    pieces = (Piece(0, 0, 0, 2, True), Piece(0, 2, 6, 2, False))
    shard = Shard((8, 3), pieces, Span((4, 3), 3, 6))
    assert [(box.start, box.shape, box.owned) for box in shard.boxes] == [
        ((1, 0), (1, 3), True),
        ((6, 0), (1, 3), False),
    ]
    copy = Shard((8, 3), pieces, Span((4, 3), 3, 6, owned=False))
    assert not any(box.owned for box in copy.boxes)


def test_an_empty_span_has_no_box() -> None:
    assert Shard((8, 3), (Piece(0, 0, 0, 8, True),), Span((8, 3), 24, 0)).boxes == ()
    assert Shard((), (Piece(0, 0, 0, 1, True),), Span((), 0, 0)).boxes == ()


def test_views_write_through_and_need_their_order_in_memory() -> None:
    parameter = torch.zeros(4, 6)
    pieces = (Piece(0, 0, 4, 3, True), Piece(0, 3, 7, 1, False))
    parameter.shard = Shard((8, 6), pieces)  # type: ignore[attr-defined]
    (rows,) = owned_rows(parameter)
    rows.fill_(2.0)
    assert (parameter[:3] == 2.0).all() and (parameter[3] == 0.0).all()
    with pytest.raises(ValueError, match=r"strides \(1, 4\) has no boxes"):
        owned_rows(parameter, torch.zeros(6, 4).T)


def test_what_is_owned_as_a_whole_needs_no_view() -> None:
    parameter, grad = torch.zeros(4, 6), torch.zeros(6, 4).T
    assert torch.equal(owned_rows(parameter, grad)[0], grad)
    for span, owned in ((None, True), (Span((6, 6), 12, 24), True), (None, False)):
        shard = Shard((8, 6), (Piece(0, 0, 2, 6 if span else 4, owned),), span)
        parameter.shard = shard  # type: ignore[attr-defined]
        assert [x.data_ptr() for x in owned_rows(parameter, grad)] == [grad.data_ptr()] * owned
    assert owned_rows(parameter, grad[:0]) == []
