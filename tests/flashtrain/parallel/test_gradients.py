"""The norm and the clip against torch's; sums over ranks are tested with the layers and the GPT."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from flashtrain.model.shard import Piece
from flashtrain.parallel.gradients import (
    average_gradients,
    clip_by_norm_,
    gradient_norm,
    sum_gradients,
    sum_partial_gradients,
)
from flashtrain.parallel.layers import PartialRows, mark_replicated, shard_parameter
from flashtrain.parallel.mesh import SINGLE, build_mesh
from tests.harness import run_ranks


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    return model


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_norm_and_clip_equal_torch(share: float) -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = gradient_norm(ours.parameters(), SINGLE)
    limit = share * norm.item()
    clip_by_norm_(ours.parameters(), norm, limit)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(model.parameters(), SINGLE)
    clip_by_norm_(model.parameters(), norm, limit=1.01 * norm.item())
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


def test_a_model_without_gradients_has_no_norm() -> None:
    with pytest.raises(ValueError, match="run backward"):
        gradient_norm(nn.Linear(2, 2).parameters(), SINGLE)


def test_terms_are_summed_and_rows_count_once(tmp_path: Path) -> None:
    run_ranks(check_terms_are_summed_and_rows_count_once, 2, tmp_path)


def check_terms_are_summed_and_rows_count_once() -> None:
    axis = build_mesh(2).tensor
    rank = dist.get_rank()
    model = nn.Module()
    model.norm = nn.Parameter(torch.zeros(3))  # replicated
    mark_replicated(model.norm, axis)
    pieces = (Piece(0, 0, 2 * rank, 2, True), Piece(0, 2, 4, 1, rank == 0))
    # rows 2 rank, 2 rank + 1 and the shared row 4 of five
    model.split = shard_parameter(torch.zeros(5, 2), pieces, (PartialRows(2, 1, 0, 1),))
    model.unused = nn.Parameter(torch.zeros(4))
    model.low = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    mark_replicated(model.low, axis)

    model.norm.grad = torch.full((3,), 1.0 + rank)
    model.split.grad = torch.full((3, 2), 10.0 * (1 + rank))
    model.low.grad = torch.full((2,), 1.0 + rank, dtype=torch.bfloat16)
    sum_partial_gradients(model.parameters(), axis)

    own = [10.0 * (1 + rank)] * 2
    assert model.norm.grad.tolist() == [3.0] * 3
    assert model.split.grad.tolist() == [own, own, [30.0, 30.0]]
    assert model.low.grad.tolist() == [3.0, 3.0]
    whole = torch.tensor([3.0] * 3 + [10.0] * 4 + [20.0] * 4 + [30.0] * 2 + [3.0] * 2)
    norm = gradient_norm(model.parameters(), axis)
    assert norm.dtype is torch.float32
    assert_close(norm, torch.linalg.vector_norm(whole))


def test_whole_gradients_are_averaged(tmp_path: Path) -> None:
    run_ranks(check_whole_gradients_are_averaged, 2, tmp_path)


def check_whole_gradients_are_averaged() -> None:
    rank = dist.get_rank()
    one, other, unused = (nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2), (5,)))
    axis = build_mesh(1).data
    for limit in (2**26, 16, 1):  # bytes that go together: all, and each gradient alone
        one.grad, other.grad = torch.full((3,), 1.0 + rank), torch.full((2, 2), 10.0 * rank)
        average_gradients([one, other, unused], axis, limit)
        assert one.grad.tolist() == [1.5] * 3
        assert other.grad.tolist() == [[5.0, 5.0]] * 2
        assert unused.grad is None
    sum_gradients([one, unused], axis)
    assert one.grad.tolist() == [3.0] * 3
