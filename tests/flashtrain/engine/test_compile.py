"""Blocks stay compiled, however many lengths a run has."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flashtrain.engine.compile import compile_blocks


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_every_length_of_a_ramp_has_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, lengths = CompileCounter(), range(16, 32)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model: Any = SimpleNamespace(blocks=[Block(), Block()])
    # not by monkeypatch, which takes a setting of torch's away when it puts it back
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(model)
        for length in lengths:
            x = torch.zeros(2, length)
            for block in model.blocks:
                x = block(x)
            assert x.eq(2).all()
    assert counter.frame_count == len(lengths)
