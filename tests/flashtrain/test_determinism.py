"""A rank whose second answer differs is named; one whose answers agree trains as it would."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain.checkpoint import Peers
from flashtrain.config import Config, ConfigError
from flashtrain.determinism import Twice, checked
from flashtrain.engine.native import NativeEngine
from tests.distributed.test_matrix import batches, build, native
from tests.harness import run_ranks


class Engine:
    """Has what `Twice` touches. `wrong(call)`: added to the loss and the gradient of a call."""

    def __init__(self, wrong: Callable[[int], float]) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.device = torch.device("cpu")
        self.wrong, self.calls = wrong, 0

    def forward_backward(self, batches: list[Any]) -> Tensor:
        self.calls += 1
        x = torch.full((2, 4), float(len(batches))) + torch.rand(2, 4)  # draws, as dropout would
        loss = self.model(x).square().sum() + self.wrong(self.calls) * self.model.weight.sum()
        loss.backward()
        self.own_loss = loss.detach()
        return self.own_loss

    def step(self, learning_rate: float) -> Tensor:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.zeros(())


def trained(engine: Any, trains: Any, steps: int = 6) -> Tensor:
    torch.manual_seed(1)
    for _ in range(steps):
        trains.forward_backward([])
        trains.step(0.1)
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


def test_a_checked_run_is_bit_for_bit_the_unchecked_one(caplog: pytest.LogCaptureFixture) -> None:
    plain, other = Engine(lambda call: 0.0), Engine(lambda call: 0.0)
    twice = Twice(other, 3, Peers())  # type: ignore[arg-type]
    assert torch.equal(trained(plain, plain), trained(other, twice))
    assert other.calls == 6 + 2
    assert not caplog.records


def test_the_rank_that_gave_two_answers_is_named(tmp_path: Path) -> None:
    run_ranks(check_named, 2, tmp_path)


def check_named() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flashtrain.determinism").addHandler(handler)
    rank = dist.get_rank()
    engine = Engine(lambda call: 1e-7 * (rank == 1 and call == 2))
    engine.forward_backward([])
    engine.calls = 0
    engine.optimizer.zero_grad()
    trained(engine, Twice(engine, 1, Peers(dist.group.WORLD)), steps=2)  # type: ignore[arg-type]
    assert all("of ranks 1 is not the same" in line for line in lines), lines
    assert len(lines) == (2 if rank == 0 else 0), lines


def test_an_error_that_sums_spread_names_all_its_ranks(tmp_path: Path) -> None:
    layout = native("gpt2", 6, replicate=2)
    run_ranks(check_spread, 2, tmp_path, layout.config(2))


def check_spread(config: Config) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flashtrain.determinism").addHandler(handler)
    engine, mesh = build(config, 2)
    assert isinstance(engine, NativeEngine)
    rank, head, calls = dist.get_rank(), engine.loss.head, []

    def wrong_once(hidden: Tensor, labels: Tensor) -> Tensor:
        calls.append(rank)
        if calls == [1]:
            hidden.register_hook(lambda grad: 1.001 * grad)
        return head(hidden, labels)

    engine.loss.head = wrong_once  # type: ignore[method-assign]
    Twice(engine, 1, Peers(dist.group.WORLD)).forward_backward(batches(0, mesh, 6))
    assert len(lines) == (rank == 0)
    for line in lines:
        assert line.startswith("the gradient of ranks 0,1 is not the same")
        assert "in the logs of all of them" in line


def test_an_engine_that_cannot_repeat_a_step_is_refused() -> None:
    other: Any = SimpleNamespace()
    assert checked(other, None, Peers()) is other
    with pytest.raises(ConfigError, match="check_determinism=5 needs engine=native"):
        checked(other, 5, Peers())
