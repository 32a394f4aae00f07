"""Each sharded layer against the dense one it came from: output and every gradient, in fp64."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from flashtrain.config import Overlap
from flashtrain.model.embedding import Embedding
from flashtrain.model.linear import Linear
from flashtrain.parallel import pipelined
from flashtrain.parallel.gradients import sum_partial_gradients
from flashtrain.parallel.layers import (
    ColumnLinear,
    Part,
    PartialRows,
    RowLinear,
    VocabularyEmbedding,
    gather_whole,
    split_rows,
)
from flashtrain.parallel.mesh import Axis, build_mesh
from flashtrain.parallel.overlap import Form, choose_form
from tests.harness import run_ranks

B, T, D = 3, 8, 6
# Query heads, then key and value heads: 2 of them over 4 ranks are shared by two ranks each. The
# sizes differ, so that mixed up parts cannot pass.
QKV = (Part(8 * 3, unit=3), Part(2 * 3, unit=3, shared=True), Part(2 * 3, unit=3, shared=True))
GATED = (Part(12), Part(12))


def fake(size: int, rank: int) -> Axis:
    """A place on an axis that nobody else is on: for arithmetic alone."""
    return Axis(size, rank, None)


def filled(module: nn.Module) -> nn.Module:
    """Random fp64 values, the same on every rank."""
    draw = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, generator=draw)
    return module


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """[B, T, ..] -> [B, T/n, ..]: an n-th of all B T tokens, in order."""
    return x.reshape(-1, x.size(-1)).chunk(axis.size)[axis.rank].view(x.size(0), -1, x.size(-1))


def own_features(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size, 2)[axis.rank]


def check_gradients(split: nn.Module, dense: nn.Module, axis: Axis) -> None:
    """Each gradient is its slice of the dense one, on every rank that holds the slice."""
    sum_partial_gradients(split.parameters(), axis)
    theirs = dict(dense.named_parameters())
    for name, ours in split.named_parameters():
        expected = theirs[name].grad
        assert ours.grad is not None
        assert expected is not None
        pieces = ours.shard.pieces  # type: ignore[attr-defined]
        slices = [expected.narrow(p.dim, p.start, p.length) for p in pieces]
        assert_close(ours.grad, torch.cat(slices, pieces[0].dim))
        assert_close(gather_whole(ours, axis, ours.grad), expected)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("overlap", [Overlap.off, Overlap.on])
def test_layers_match_dense_ones(overlap: Overlap, ranks: int, tmp_path: Path) -> None:
    run_ranks(check_layers, ranks, tmp_path, overlap)


def check_layers(overlap: Overlap) -> None:
    axis = build_mesh(dist.get_world_size()).tensor
    form = choose_form(axis, overlap, torch.device("cpu"))
    pipelined.SMALLEST = 1  # parts of 12 and 6 rows travel in two pieces
    for parts in ((), GATED, QKV):
        for bias in (False, True):
            check_column(axis, parts, bias, form)
    for bias in (False, True):
        check_row(axis, bias, form)
    check_embedding(axis)
    check_vectors(axis)


def check_column(axis: Axis, parts: Sequence[Part], bias: bool, form: Form) -> None:
    rows = sum(p.rows for p in parts) or 16
    dense = filled(Linear(D, rows, bias))
    split = ColumnLinear.from_dense(dense, axis, parts)
    split.form = form
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, dtype=torch.float64, generator=draw)
    dense_x = x.clone().requires_grad_()
    split_x = own_tokens(x, axis).clone().requires_grad_()
    dense_y, split_y = dense(dense_x), split(split_x)

    grad_y = torch.zeros_like(dense_y)  # the sum of what flows back on each rank
    for rank in range(axis.size):
        pieces, _ = split_rows(parts or (Part(rows),), fake(axis.size, rank))
        width = sum(p.length for p in pieces)
        term = torch.randn(B, T, width, dtype=torch.float64, generator=draw)
        for p in pieces:
            grad_y.narrow(2, p.start, p.length).add_(term.narrow(2, p.local, p.length))
        if rank == axis.rank:
            own = torch.cat([dense_y.narrow(2, p.start, p.length) for p in pieces], 2)
            assert_close(split_y, own)
            assert (split.out_features, split.in_features) == (width, D)
            own_term = term
    dense_y.backward(grad_y)
    split_y.backward(own_term)
    assert dense_x.grad is not None
    assert_close(split_x.grad, own_tokens(dense_x.grad, axis))
    check_gradients(split, dense, axis)
    check_round_trip(split.to_dense(), dense)


def check_row(axis: Axis, bias: bool, form: Form) -> None:
    dense = filled(Linear(12, D, bias))
    split = RowLinear.from_dense(dense, axis)
    split.form = form
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, 12, dtype=torch.float64, generator=draw)
    dense_x = x.clone().requires_grad_()
    split_x = own_features(x, axis).clone().requires_grad_()
    dense_y, split_y = dense(dense_x), split(split_x)
    assert_close(split_y, own_tokens(dense_y, axis))
    assert (split.out_features, split.in_features) == (D, 12 // axis.size)

    grad_y = torch.randn(B, T, D, dtype=torch.float64, generator=draw)
    dense_y.backward(grad_y)
    split_y.backward(own_tokens(grad_y, axis))
    assert dense_x.grad is not None
    assert_close(split_x.grad, own_features(dense_x.grad, axis))
    check_gradients(split, dense, axis)
    check_round_trip(split.to_dense(), dense)


def check_embedding(axis: Axis) -> None:
    dense = filled(Embedding(20, D, torch.float64))
    split = VocabularyEmbedding.from_dense(dense, axis)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (B, T), generator=draw)
    tokens[0, :2] = torch.tensor([0, 19])
    dense_y, split_y = dense(tokens), split(tokens)
    assert_close(split_y, own_tokens(dense_y, axis), rtol=0, atol=0)
    grad_y = torch.randn(B, T, D, dtype=torch.float64, generator=draw)
    dense_y.backward(grad_y)
    split_y.backward(own_tokens(grad_y, axis))
    check_gradients(split, dense, axis)
    check_round_trip(split.to_dense(), dense)


def check_vectors(axis: Axis) -> None:
    """Positions that are added to the embedding: for whole sequences, parts of them, each token."""
    dense = Embedding(20, D, torch.float64)
    split = VocabularyEmbedding.from_dense(filled(dense), axis)
    draw = torch.Generator().manual_seed(2)
    for batch in (B, axis.size):
        x = torch.randn(batch, T, D, dtype=torch.float64, generator=draw)
        for shape in ((T, D), (batch, T, D)):
            vectors = torch.randn(shape, generator=draw)
            whole = dense.add(x, vectors)
            assert torch.equal(split.add(own_tokens(x, axis), vectors), own_tokens(whole, axis))


def check_round_trip(again: nn.Module, dense: nn.Module) -> None:
    assert type(again) is type(dense)
    ours, theirs = dict(again.named_parameters()), dict(dense.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])


def test_activations_decide_the_compute_dtype() -> None:
    axis, x = fake(2, 1), torch.randn(1, 4, D, dtype=torch.bfloat16)
    column = ColumnLinear.from_dense(Linear(D, 8, bias=True), axis)
    row = RowLinear.from_dense(Linear(16, D, bias=True), axis)
    table = VocabularyEmbedding.from_dense(Embedding(8, D, torch.bfloat16), axis)
    assert table(torch.zeros(1, 4, dtype=torch.int64)).dtype is torch.bfloat16
    assert column(x).dtype is torch.bfloat16
    assert row(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert {p.dtype for p in (*column.parameters(), *row.parameters())} == {torch.float32}


def test_heads_fewer_than_ranks_are_shared_whole() -> None:
    owned = []
    for rank in range(4):
        pieces, partial = split_rows(QKV, fake(4, rank))
        assert [(p.local, p.start, p.length) for p in pieces] == [
            (0, 6 * rank, 6),
            (6, 24 + rank // 2 * 3, 3),
            (9, 30 + rank // 2 * 3, 3),
        ]
        assert partial == (
            PartialRows(6, 3, rank // 2 * 3, 6),
            PartialRows(9, 3, rank // 2 * 3, 6),
        )
        owned += [row for p in pieces if p.owned for row in range(p.start, p.start + p.length)]
    assert sorted(owned) == list(range(36))  # each row has one owner


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((Part(10),), "10 rows do not divide over 4 tensor ranks"),
        ((Part(18, unit=3),), "6 units of 3 rows do not divide over 4"),
        ((Part(6, unit=3),), "2 units of 3 rows do not divide over 4"),
        ((Part(9, unit=3, shared=True),), "3 units of 3 rows do not divide over 4"),
    ],
)
def test_rows_that_do_not_divide_are_refused(parts: Sequence[Part], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        split_rows(parts, fake(4, 0))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not add up to 16 rows"):
        ColumnLinear.from_dense(Linear(D, 16), fake(2, 0), (Part(12),))
    with pytest.raises(ValueError, match="9 columns do not divide over 2 tensor ranks"):
        RowLinear.from_dense(Linear(9, D), fake(2, 0))
    with pytest.raises(ValueError, match="9 rows do not divide over 2 tensor ranks"):
        VocabularyEmbedding.from_dense(Embedding(9, D, torch.float32), fake(2, 0))


@pytest.mark.parametrize(("rank", "word"), [(1, 8), (0, -1)])
def test_words_beyond_the_table_fail_as_in_a_dense_one(rank: int, word: int) -> None:
    table = VocabularyEmbedding.from_dense(Embedding(8, D, torch.float32), fake(2, rank))
    with pytest.raises(IndexError, match="index out of range"):
        table(torch.tensor([[word]]))
