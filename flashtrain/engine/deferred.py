"""Backward in two halves, for schedules that fill a pipeline's waits with the second one.

    y = x W^T + b      first half   dx = dy W, which the rank before waits for
                       second half  dW = dy^T x, db = sum of dy, which nobody waits for

(Qi et al. 2024, arXiv:2401.10241). Between the halves x and dy of every layer stay in memory. What
is small or rare, such as norms and the head, has all of its backward in the first half.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.model.gpt import GPT
from flashtrain.model.linear import Linear
from kernels.linear import parameter_gradients

# weight and bias, None where there is none to train; x, dy
Work = list[tuple[nn.Parameter | None, nn.Parameter | None, Tensor, Tensor]]


class DeferredGradients:
    """The second halves that backward has left behind, in one model."""

    def __init__(self, model: GPT) -> None:
        """Lets the linear layers of the blocks leave theirs here, in place."""
        self.work: Work = []
        for block in model.blocks:
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.product = self.product

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, self.work
        )
        return y

    def take(self) -> Callable[[], None]:
        """What computes those of all backwards since the last call."""
        work = list(self.work)
        self.work.clear()
        return partial(_finish, work)


class _Product(torch.autograd.Function):
    """x [.., in], weight [out, in], bias [out] -> [.., out], as model/linear.py's `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None)
        # the parameters themselves: recomputation gives back saved ones as other tensors
        ctx.parameters, ctx.work = (weight, bias), work
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        weight, bias = ctx.parameters
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if x is not None:
            trained = weight if needs_weight else None, bias if needs_bias else None
            ctx.work.append((*trained, x, grad))
        return grad @ weight.to(grad.dtype) if needs_x else None, None, None, None


@torch.no_grad()
def _finish(work: Work) -> None:
    while work:
        weight, bias, x, grad = work.pop()
        of_weight, of_bias = (None if p is None else p.dtype for p in (weight, bias))
        terms = parameter_gradients(grad.flatten(0, -2), x.flatten(0, -2), of_weight, of_bias)
        for parameter, term in zip((weight, bias), terms, strict=True):
            if parameter is None or term is None:
                continue
            if parameter.grad is None:
                parameter.grad = term
            else:
                parameter.grad += term
