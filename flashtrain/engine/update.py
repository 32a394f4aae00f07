"""The end of a step, once gradients are averaged: norm, clip, optimizer."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from flashtrain.optim import step_unless_bad
from flashtrain.parallel.gradients import clip_by_norm_, gradient_norm, sum_partial_gradients
from flashtrain.parallel.mesh import Mesh


def update(
    parameters: Iterable[nn.Parameter],
    optimizer: Optimizer,
    mesh: Mesh,
    learning_rate: float,
    clip_norm: float | None,
) -> Tensor:
    """Move the weights and forget the gradients of `parameters`, plain tensors as `held_parameters`
    gives them.

    Returns the norm of the whole model's gradient before clipping, 0-dim, equal on all ranks; where
    it is not finite nothing moves, on any of them.
    """
    parameters = list(parameters)
    sum_partial_gradients(parameters, mesh.tensor)
    norm = gradient_norm(parameters, mesh.tensor, mesh.shard, mesh.pipeline)
    if clip_norm is not None:
        clip_by_norm_(parameters, norm, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]
    step_unless_bad(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return norm
