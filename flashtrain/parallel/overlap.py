"""A product with its collectives, so that the backward runs some of both at the same time.

Dims: B batch, T tokens, n ranks, I input features, O this rank's output features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrain.parallel.collectives import (
    finish_gather,
    finish_scatter,
    gather_sequence,
    start_gather,
    start_scatter,
)
from flashtrain.parallel.mesh import Axis


def gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    """`F.linear(gather_sequence(x), weight, bias)`: [B, T/n, I] -> [B, T, O]; all of one dtype.

    forward   y_r = X W_r^T + b_r  with X = concat over s of x_s, along T
    backward  dX_r = dy_r W_r             while X is gathered once more
              dW_r = dy_r^T X             while dx = (sum over s of dX_s)[part r of T] is scattered
              db_r = sum of dy_r over tokens

    As two ops, autograd would run both products before the scatter, and keep X [B, T, I] for each
    layer: the one activation that more ranks do not make smaller. Here x is kept. torch.compile
    merges the two gathers and keeps X after all (2.13): it sends less and holds more.
    """
    if axis.group is None:
        return F.linear(gather_sequence(x, axis), weight, bias)
    y: Tensor = _GatherLinear.apply(x, weight, bias, axis.size, axis.name)
    return y


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: int, name: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.name = size, name
        return F.linear(finish_gather(start_gather(x, size, name)), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gathering = start_gather(x, ctx.size, ctx.name)
        scattering = start_scatter(grad @ weight, ctx.size, ctx.name)
        rows = grad.flatten(0, 1)  # [B T, O]
        grad_weight = rows.T @ finish_gather(gathering).flatten(0, 1)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return finish_scatter(scattering), grad_weight, grad_bias, None, None
