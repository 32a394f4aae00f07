"""Each op against its algebra, written out from what all ranks hold."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.parallel.collectives import (
    gather_sequence,
    scatter_sequence,
    slice_sequence,
)
from flashtrain.parallel.mesh import SINGLE, Axis, build_mesh
from tests.harness import run_ranks

Op = Callable[[Tensor, Axis], Tensor]


def everybodys(axis: Axis, *shape: int, seed: int = 0) -> list[Tensor]:
    """What each rank holds, known on all of them."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(axis.size)]


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """[B, T, D] -> [B, T/n, D]: an n-th of all B T tokens, in order."""
    rows = x.reshape(-1, x.size(-1)).chunk(axis.size)[axis.rank]
    return rows.view(x.size(0), -1, x.size(-1))


def joined(parts: list[Tensor]) -> Tensor:
    """The [B, T, D] whose parts are these."""
    rows = torch.cat([part.flatten(0, 1) for part in parts])
    return rows.view(parts[0].size(0), -1, rows.size(-1))


def run(op: Op, axis: Axis, xs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = xs[axis.rank].clone().requires_grad_()
    y = op(x, axis)
    y.backward(grads[axis.rank])
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("op", [gather_sequence, scatter_sequence, slice_sequence])
def test_an_axis_of_one_is_the_identity(op: Op) -> None:
    x = torch.randn(2, 4, 3)
    assert_close(op(x, SINGLE), x, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_do_what_their_docstrings_say(ranks: int, tmp_path: Path) -> None:
    run_ranks(check_collectives, ranks, tmp_path)


def check_collectives() -> None:
    axis = build_mesh(torch.distributed.get_world_size()).tensor
    for batch in (1, 3):
        parts = everybodys(axis, batch, 2, 5)  # [B, T/n, D]
        wholes = everybodys(axis, batch, 2 * axis.size, 5, seed=1)  # [B, T, D]

        y, dx = run(gather_sequence, axis, parts, wholes)
        assert_close(y, joined(parts))
        assert_close(dx, own_tokens(sum(wholes), axis))

        y, dx = run(scatter_sequence, axis, wholes, parts)
        assert_close(y, own_tokens(sum(wholes), axis))
        assert_close(dx, joined(parts))

        y, dx = run(slice_sequence, axis, wholes, parts)
        assert_close(y, own_tokens(wholes[axis.rank], axis))
        assert_close(own_tokens(dx, axis), parts[axis.rank])
        assert dx.count_nonzero() == parts[0].numel()

    for op in (scatter_sequence, slice_sequence):
        with pytest.raises(ValueError, match=f"3 tokens .* over {axis.size} .* pad it to 4"):
            op(torch.zeros(1, 3, 5), axis)


def test_collectives_trace_into_one_graph(tmp_path: Path) -> None:
    run_ranks(check_collectives_trace, 2, tmp_path)


def check_collectives_trace() -> None:
    axis = build_mesh(2).tensor

    def block(x: Tensor) -> Tensor:
        y = scatter_sequence(gather_sequence(x, axis).square(), axis)
        return y.sin() + slice_sequence(x, axis).repeat(1, axis.size, 1)

    traced = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    results = []
    for function in (block, traced):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad))
    assert_close(results[1], results[0])
