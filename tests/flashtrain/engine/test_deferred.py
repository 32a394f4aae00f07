"""Gradients of weights that are left for later are those that backward would have made at once."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.engine.deferred import DeferredGradients
from flashtrain.model.gpt import GPT
from flashtrain.parallel.mesh import SINGLE

CPU = torch.device("cpu")
TINY = [
    "data=random", "model.vocabulary=64", "model.d_model=32", "model.n_layers=2",
    "model.bias=true", "data.sequence_length=16", "trainer.compile=false",
]  # fmt: skip


def model(*overrides: str) -> GPT:
    return build_model(load([*TINY, *overrides]), SINGLE, CPU)


def backward(one: GPT, seed: int) -> None:
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
    one(tokens).float().square().sum().backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_both_halves_are_the_whole(precision: str, mlp: str) -> None:
    overrides = (f"precision={precision}", f"model.mlp={mlp}", "attention=torch")
    plain, split = model(*overrides), model(*overrides)
    deferred = DeferredGradients(split)
    halves = []
    for seed in range(3):  # as a pipeline does: several first halves before a second one
        backward(plain, seed)
        backward(split, seed)
        halves.append(deferred.take())
    for name, parameter in split.named_parameters():
        waits = name.startswith("blocks.") and "norm" not in name
        assert (parameter.grad is None) == waits, name
    for half in halves:
        half()
    for (name, one), other in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert_close(other.grad, one.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_recomputation_leaves_them_once() -> None:
    plain, split = model("precision=fp32"), model("precision=fp32")
    deferred = DeferredGradients(split)
    for one in (plain, split):
        for block in one.blocks:
            whole = block.forward
            block.forward = lambda *x, whole=whole: checkpoint(whole, *x, use_reentrant=False)
        backward(one, 0)
    deferred.take()()
    for one, other in zip(plain.parameters(), split.parameters(), strict=True):
        assert_close(other.grad, one.grad)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_get_none(frozen: tuple[str, ...]) -> None:
    plain, split = model("precision=fp32"), model("precision=fp32")
    deferred = DeferredGradients(split)
    for one in (plain, split):
        for name, parameter in one.blocks[1].named_parameters():
            parameter.requires_grad_(not name.endswith(frozen))
        backward(one, 0)
    kept = len(deferred.work)
    deferred.take()()
    for (name, whole), half in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert (half.grad is None) == (whole.grad is None), name
        if whole.grad is not None:
            assert_close(half.grad, whole.grad)
    assert kept == (4 if len(frozen) == 2 else 8)  # 4 products of a block: x and dy of no other


def test_without_gradients_nothing_waits() -> None:
    split = model()
    deferred = DeferredGradients(split)
    with torch.no_grad():
        split(torch.zeros(1, 16, dtype=torch.int64))
    assert not deferred.work
