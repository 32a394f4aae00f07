"""A rank that holds some of the parameters loads those, and names that nobody holds are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from flashtrain import checkpoint
from flashtrain.checkpoint import CheckpointError, State, collect, collect_parameters, prepare


def trained() -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "last": nn.Linear(3, 2)})
    optimizer = AdamW(model.parameters())
    model["last"](model["first"](torch.randn(4, 3))).sum().backward()
    optimizer.step()
    return model, optimizer


def part(path: Path, elsewhere: frozenset[str]) -> tuple[nn.Linear, AdamW, State]:
    """Of a rank that holds `last` only."""
    torch.manual_seed(1)
    layer = nn.Linear(3, 2)
    optimizer = AdamW(layer.parameters())
    parameters = {f"last.{name}": p for name, p in layer.named_parameters()}
    prepare(parameters, optimizer, checkpoint.saved_names(path))
    own = collect_parameters(parameters, optimizer.state)
    return layer, optimizer, State(own.tensors, own.scalars, elsewhere)


def test_what_is_elsewhere_is_not_missed(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, collect(model, optimizer), {})
    layer, own, state = part(path, frozenset({"first.weight", "first.bias"}))
    checkpoint.load(path, state)
    whole = model["last"]
    assert isinstance(whole, nn.Linear)
    for mine, theirs in zip(layer.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(own.state[mine][key], value)


def test_what_is_nowhere_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, collect(*trained()), {})
    _, _, state = part(path, frozenset({"first.weight"}))
    with pytest.raises(CheckpointError, match=r"first\.bias .* not in this run"):
        checkpoint.load(path, state)
