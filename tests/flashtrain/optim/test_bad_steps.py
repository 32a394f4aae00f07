"""A step whose gradient is not finite changes nothing, whichever way the optimizer is told."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from flashtrain.optim import step_unless_bad

MADE = {
    "fused AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "another": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


def trained(name: str, device: str, bad_at: int | None) -> tuple[nn.Parameter, Optimizer]:
    """Four steps, of which one may come with a gradient that is not finite."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 7, device=device))
    optimizer = MADE[name]([parameter])
    for number in range(4):
        gradient = torch.randn(5, 7, device=device)
        if number == bad_at:
            gradient = torch.full_like(gradient, float("nan"))
            before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
        parameter.grad = gradient
        step_unless_bad(optimizer, gradient.norm())
        if number == bad_at:
            assert torch.equal(parameter, before)
            for key, value in state["state"].get(0, {}).items():
                assert torch.equal(
                    torch.as_tensor(optimizer.state[parameter][key]).cpu(),
                    torch.as_tensor(value).cpu(),
                ), key
    return parameter, optimizer


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("bad_at", [1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_bad_step_leaves_weights_and_moments(name: str, bad_at: int, device: str) -> None:
    trained(name, device, bad_at)


@pytest.mark.parametrize("name", MADE)
def test_good_steps_are_the_optimizers_own(name: str) -> None:
    ours, _ = trained(name, "cpu", None)
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 7))
    optimizer = MADE[name]([parameter])
    for _ in range(4):
        parameter.grad = torch.randn(5, 7)
        optimizer.step()
    assert torch.equal(ours, parameter)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("limit", [0.5, 100.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_clipping_is_torchs(name: str, limit: float, device: str) -> None:
    torch.manual_seed(0)
    start, gradient = (torch.randn(5, 7, device=device) for _ in "ab")
    ours, theirs = (nn.Parameter(start.clone()) for _ in "ab")
    for parameter in (ours, theirs):
        parameter.grad = gradient.clone()
    step_unless_bad(MADE[name]([ours]), gradient.norm(), limit)
    torch.nn.utils.clip_grad_norm_([theirs], limit)
    MADE[name]([theirs]).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
