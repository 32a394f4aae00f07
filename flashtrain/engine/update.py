"""The end of a step, once gradients are averaged: norm, clip, optimizer."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from flashtrain.optim import step_unless_bad
from flashtrain.parallel.gradients import gradient_norm, sum_partial_gradients
from flashtrain.parallel.mesh import Mesh


def update(
    parameters: Iterable[nn.Parameter],
    optimizer: Optimizer,
    mesh: Mesh,
    learning_rate: float | None,
    clip_norm: float | None,
) -> Tensor:
    """Move the weights and forget the gradients of `parameters`, plain tensors as `held_parameters`
    gives them.

    learning_rate: None leaves what `set_rates` set.

    Returns the norm of the whole model's gradient before clipping, 0-dim, equal on all ranks; where
    it is not finite nothing moves, on any of them.
    """
    parameters = list(parameters)
    sum_partial_gradients(parameters, mesh.tensor)
    norm = gradient_norm(parameters, mesh.tensor, mesh.shard, mesh.pipeline)
    if learning_rate is not None:
        set_rates(optimizer, learning_rate)
    step_unless_bad(optimizer, norm, clip_norm)
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rates(optimizer: Optimizer, learning_rate: float) -> None:
    """Of every group; where it is a number on the device it stays at its address."""
    for group in optimizer.param_groups:
        rate = learning_rate * group["lr_ratio"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
