"""Products that are computed part by part, while parts of their input or output travel.

Dims: B batch, T tokens, n ranks, m = B T / n rows of one part, I input features, O output features
of this rank. Parts are of all B T tokens in order (collectives.py), so each is a matrix in memory.

    gather, then product   Y[s] = x_s W^T: the own part at once, each other one as it arrives
    product, then scatter  y = sum over s of X_s[part r] W_s^T: the sum for the rank before last in
                           the ring first; each step adds this rank's term to what came in, in the
                           product itself (addmm), and passes it on

The backward of each is the other one, and the weight's gradient is one product over all tokens,
computed when the gathered input has long arrived. Nothing but inputs is kept.

Each is one operator (torch.library), so torch.compile keeps it whole and calls it. The transport is
looked up by the group's name. Products read the weight as `low`, in x's dtype; the gradient is that
of `weight`, in its own dtype: fp32 of a master weight leaves the product unrounded.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.parallel.transport import Gathering, Transport, others, transport_of
from kernels.linear import parameter_gradients
from kernels.operation import operation, register_autograd, register_fake

# pieces in which a part travels: the first is on its way sooner, products get smaller
CHUNKS = 2
SMALLEST = 256  # rows: a smaller piece would not fill a GPU


def pieces(rows: int) -> int:
    """How many pieces a part of this many rows travels in."""
    return CHUNKS if rows % CHUNKS == 0 and rows // CHUNKS >= SMALLEST else 1


@operation("flashtrain::gather_linear")
def gather_linear(
    x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, size: int, name: str
) -> Tensor:
    """x_r [B, T/n, I], low and weight [O, I], bias [O] -> [B, T, O]; all contiguous but weights."""
    transport = transport_of(name)
    y = x.new_empty(x.size(0), size * x.size(1), low.size(0))
    rows = x.flatten(0, 1)
    gathering = transport.gather(rows, pieces(rows.size(0)))
    _products(gathering, transport, rows, low.T, bias, y.flatten(0, 1))
    gathering.release()
    return y


@register_fake(gather_linear)
def _(x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, size: int, name: str) -> Tensor:
    return x.new_empty(x.size(0), size * x.size(1), low.size(0))


@operation("flashtrain::gather_linear_backward")
def _gather_linear_backward(
    grad: Tensor, x: Tensor, low: Tensor, size: int, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grad [B, T, O] -> dx_r [B, T/n, I], dW [O, I] in dtype"""
    transport = transport_of(name)
    rows, dx = grad.flatten(0, 1), torch.empty_like(x)
    own = x.flatten(0, 1)
    gathering = transport.gather(own, pieces(own.size(0)), whole=True)
    _products_to_ring(transport, rows, low, dx.flatten(0, 1))
    dw = _weight_gradient(rows, gathering.whole(), dtype)
    gathering.release()
    return dx, dw


@register_fake(_gather_linear_backward)
def _(
    grad: Tensor, x: Tensor, low: Tensor, size: int, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), grad.new_empty(low.shape, dtype=dtype)


@operation("flashtrain::linear_scatter")
def linear_scatter(x: Tensor, low: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    """x_r [B, T, I], low and weight [O, I] -> [B, T/n, O], this rank's part of the ranks' sum."""
    y = x.new_empty(x.size(0), x.size(1) // size, low.size(0))
    _products_to_ring(transport_of(name), x.flatten(0, 1), low.T, y.flatten(0, 1))
    return y


@register_fake(linear_scatter)
def _(x: Tensor, low: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.size(0), x.size(1) // size, low.size(0))


@operation("flashtrain::linear_scatter_backward")
def _linear_scatter_backward(
    grad: Tensor, x: Tensor, low: Tensor, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grad_r [B, T/n, O] -> dx [B, T, I], dW [O, I] in dtype"""
    transport = transport_of(name)
    rows, dx = grad.flatten(0, 1), torch.empty_like(x)
    gathering = transport.gather(rows, pieces(rows.size(0)), whole=True)
    _products(gathering, transport, rows, low, None, dx.flatten(0, 1))
    dw = _weight_gradient(gathering.whole(), x.flatten(0, 1), dtype)
    gathering.release()
    return dx, dw


@register_fake(_linear_scatter_backward)
def _(grad: Tensor, x: Tensor, low: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), grad.new_empty(low.shape, dtype=dtype)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    dw, _ = parameter_gradients(dy, x, dtype, None)
    assert dw is not None
    return dw


def _products(
    gathering: Gathering,
    transport: Transport,
    own: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """y [n m, O] = gathered x [n m, I] @ weight [I, O] + bias, part by part."""
    parts = y.chunk(transport.size)
    _product(own, weight, bias, parts[transport.rank])
    chunks = pieces(own.size(0))
    for rank in others(transport.rank, transport.size):
        for chunk, out in enumerate(parts[rank].chunk(chunks)):
            _product(gathering.take(rank, chunk), weight, bias, out)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _products_to_ring(transport: Transport, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y [m, O] = (sum over ranks of x [n m, I] @ weight [I, O])[part r].

    At step j this rank adds to the sum for rank r - 1 - j; the last step is its own.
    """
    rank, size, chunks = transport.rank, transport.size, pieces(y.size(0))
    parts, last = x.chunk(size), size - 1
    ring = transport.ring(chunks, y)
    for step in range(size):
        terms = parts[(rank + last - step) % size].chunk(chunks)
        sums = y.chunk(chunks) if step == last else [ring.place(step, c) for c in range(chunks)]
        for chunk, total in enumerate(sums) if step else ():
            ring.receive(step - 1, chunk, total)
        for chunk, (term, total) in enumerate(zip(terms, sums, strict=True)):
            if step == 0:
                torch.mm(term, weight, out=total)
            else:
                ring.arrived(step - 1, chunk)
                total.addmm_(term, weight)
            if step < last:
                ring.send(step, chunk)
    ring.release()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, low, weight = inputs[:3]
    ctx.save_for_backward(x, low)
    ctx.dtype = weight.dtype
    ctx.size, ctx.name = inputs[-2:]


def _gather_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, low = ctx.saved_tensors
    dx, dw = _gather_linear_backward(grad.contiguous(), x, low, ctx.size, ctx.name, ctx.dtype)
    db = grad.flatten(0, 1).sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, dw, db, None, None


def _scatter_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, low = ctx.saved_tensors
    dx, dw = _linear_scatter_backward(grad.contiguous(), x, low, ctx.name, ctx.dtype)
    return dx, None, dw, None, None


register_autograd(gather_linear, _gather_gradients, setup_context=_keep)
register_autograd(linear_scatter, _scatter_gradients, setup_context=_keep)
