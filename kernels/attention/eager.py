"""The same ops without the dispatcher, for plain eager calls, whose time it would double.

A custom op exists for what looks at a program from outside: torch.compile, fake tensors,
functorch, dispatch modes. Where none of them is about, an autograd function around the same
implementation computes the same numbers, and what was decided for a call is looked up.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.registration import (
    Options,
    backward_op,
    gradients_of,
    run_backward,
    run_forward,
    save,
)
from kernels.attention.select import Choice


def is_plain(*tensors: Tensor | int | None) -> bool:
    """Nobody but autograd looks at a call on these tensors: no compiler, no mode, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in _PLAIN for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None), int}


def layout(x: Tensor | int | None) -> tuple[object, ...] | None:
    """All that the checks and the choice of backend look at in a tensor."""
    if not isinstance(x, Tensor):
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def attention_eager(
    q: Tensor, k: Tensor, v: Tensor, given: Options, choice: Choice
) -> tuple[Tensor, Tensor]:
    """What the op `attention_forward` returns, gradients included."""
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, given.sinks, given.bias)
    ):
        result: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, *given, choice)
        return result
    return run_forward(q, k, v, given, choice)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *options, ctx.choice = rest
        output = run_forward(q, k, v, Options(*options), ctx.choice)
        save(ctx, (q, k, v, *options), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        # not plain: compiled autograd, or a mode entered since
        plain = is_plain(d_out, d_lse)
        run = partial(run_backward, choice=ctx.choice) if plain else backward_op
        return *gradients_of(ctx, run, d_out, d_lse), None
