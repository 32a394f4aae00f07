from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs.test_single_process import script

explain = script("explain_attention")
B, T, H, D = 2, 192, 3, 16


def inputs(length: int = T) -> list[Tensor]:
    return [torch.randn(B, length, H, D, requires_grad=True) for _ in range(3)]


def test_both_are_the_same_function() -> None:
    one = inputs()
    other = [x.detach().clone().requires_grad_() for x in one]
    ours, theirs = explain.fused(*one), explain.eager(*other)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, their in zip(one, other, strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


class Passes(TorchDispatchMode):
    """How often a tensor as large as all scores is read or written, views aside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "view" not in str(func) and "expand" not in str(func) and "transpose" not in str(func):
            for tensor in (*args, out):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.count += tensor.numel() == B * H * T * T
        return out


def test_eager_passes_over_the_scores_as_often_as_counted() -> None:
    with Passes() as passes, torch.no_grad():
        explain.eager(*inputs())
    assert passes.count == 6
    size = explain.eager_traffic(B, T, H, D, 4)
    assert size == 4 * (6 * B * H * T * T + 6 * B * H * T * D)


def test_fused_reads_what_it_must_and_keys_once_a_tile() -> None:
    must = 4 * 4 * B * H * T * D + 4 * B * H * T  # q, k, v, out, sums
    assert explain.fused_traffic(B, explain.TILE, H, D, 4) == must * explain.TILE // T
    assert explain.fused_traffic(B, T, H, D, 4) > must  # a second tile
    assert explain.fused_traffic(B, T, H, D, 4) < explain.eager_traffic(B, T, H, D, 4)


def test_memory_grows_with_the_square_for_eager_alone() -> None:
    def peak(compute: object, length: int) -> float:
        found = explain.measure(compute, inputs(length), 1)
        assert found is not None
        return float(found[0])

    assert 3.3 < peak(explain.eager, 512) / peak(explain.eager, 256) < 4.1
    assert peak(explain.fused, 512) / peak(explain.fused, 256) == pytest.approx(2, abs=0.2)


def test_the_trick_ends_with_the_exact_result(capsys: pytest.CaptureFixture[str]) -> None:
    explain.show_trick()
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "all at once" in x)
    ours, exact = line.replace(";", "").split("= ")[1].split(" all at once: ")
    assert ours == exact
