"""Differentiable collectives over one mesh axis: each op's docstring is its algebra.

Dims: B batch, T tokens of a sequence, D features, n ranks. `x_r` is what rank r holds, `dx_r` its
gradient. On an axis of one all are the identity. What starts and finishes a transfer apart, for
overlap with other work, has no gradient of its own.

Parts are of all B T tokens in order: rank r holds those from r B T / n on, for B = n the r-th
sequence, as [B, T/n, D] whatever sequences they are of. So what is gathered lies in memory as the
whole does, and nothing is moved before or after a transfer.

Below are PyTorch's functional collectives (out of place, group by name), the only ones that
`torch.compile(fullgraph=True)` traces. They are called by operator, since their Python wrappers
were renamed in 2.13; and inside our own autograd Functions, since their own backward is of 2.13
too. A wait on CUDA holds up the stream, not the host.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.parallel.mesh import Axis

_c10d = torch.ops._c10d_functional


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """All tokens from their parts: [B, T/n, D] -> [B, T, D].

    forward   y = concat over s of x_s
    backward  dx_r = (sum over s of dy_s)[part r]
    """
    return x if axis.group is None else _GatherSequence.apply(x, axis.size, axis.name)


def scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the sum over ranks: [B, T, D] -> [B, T/n, D].

    forward   y_r = (sum over s of x_s)[part r]
    backward  dx_r = concat over s of dy_s

    Raises ValueError when n does not divide T.
    """
    if axis.group is None:
        return x
    check_divides(x.size(1), axis.size)
    y: Tensor = _ScatterSequence.apply(x, axis.size, axis.name)
    return y


def slice_sequence(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of a tensor that every rank holds: [B, T, D] -> [B, T/n, D].

    forward   y_r = x[part r]
    backward  dx_r = dy_r in part r, zero elsewhere: a term of the gradient, still to be summed

    Raises ValueError when n does not divide T.
    """
    check_divides(x.size(1), axis.size)
    length = x.size(1) // axis.size
    return x.flatten(0, 1).chunk(axis.size)[axis.rank].view(x.size(0), length, x.size(2))


def check_divides(tokens: int, size: int) -> None:
    if tokens % size:
        raise ValueError(
            f"a sequence of {tokens} tokens does not divide over {size} tensor ranks: pad it to "
            f"{-(-tokens // size) * size}"
        )


def start_gather(x: Tensor, size: int, name: str) -> Tensor:
    """[B, T/n, D] -> [n B, T/n, D], to be read only through `finish_gather`. No gradient."""
    pending: Tensor = _c10d.all_gather_into_tensor(x.contiguous(), size, name)
    return pending


def finish_gather(pending: Tensor, size: int) -> Tensor:
    """[n B, T/n, D] -> [B, T, D], a view."""
    parts = _wait(pending)
    return parts.view(parts.size(0) // size, -1, parts.size(-1))


def start_scatter(x: Tensor, size: int, name: str) -> Tensor:
    """[B, T, D] -> [B, T/n, D], to be read only through `finish_scatter`. No gradient."""
    parts = x.contiguous().view(size * x.size(0), -1, x.size(-1))
    pending: Tensor = _c10d.reduce_scatter_tensor(parts, "sum", size, name)
    return pending


def finish_scatter(pending: Tensor) -> Tensor:
    return _wait(pending)


def all_gather(x: Tensor, size: int, name: str) -> Tensor:
    """[...] -> [n, ...], no gradient."""
    return _wait(_c10d.all_gather_into_tensor(x.contiguous().unsqueeze(0), size, name))


def start_gathers(xs: list[Tensor], size: int, name: str) -> list[Tensor]:
    """What every rank holds, several tensors in one transfer: each [...] -> [n, ...], to be read
    only through `finish_all`. No gradient."""
    own = [x.contiguous().unsqueeze(0) for x in xs]
    pending: list[Tensor] = _c10d.all_gather_into_tensor_coalesced(own, size, name)
    return pending


def start_scatters(xs: list[Tensor], size: int, name: str) -> list[Tensor]:
    """This rank's part of the sum over ranks, several tensors in one transfer: each [n, ...] ->
    [1, ...], to be read only through `finish_all`. No gradient."""
    terms = [x.contiguous() for x in xs]
    pending: list[Tensor] = _c10d.reduce_scatter_tensor_coalesced(terms, "sum", size, name)
    return pending


def finish_all(pending: list[Tensor]) -> list[Tensor]:
    return [_wait(x) for x in pending]


def exchange_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Part s of x goes to rank s: [n, ...] -> [n, ...].

    forward   y_r[s] = x_s[r]
    backward  dx_r[s] = dy_s[r]
    """
    y: Tensor = _ExchangeRanks.apply(x, axis.size, axis.name)
    return y


def start_shift(x: Tensor, rank: int, size: int, name: str) -> Tensor:
    """What the rank before this one holds, in a ring; to be read only through `finish_shift`. No
    gradient. x: contiguous, of one shape on all ranks."""
    sent, received = [0] * size, [0] * size
    sent[(rank + 1) % size] = received[(rank - 1) % size] = x.numel()
    pending: Tensor = _c10d.all_to_all_single(x.flatten(), received, sent, name)
    return pending.view(x.shape)


def finish_shift(pending: Tensor) -> Tensor:
    return _wait(pending)


def _wait(pending: Tensor) -> Tensor:
    done: Tensor = _c10d.wait_tensor(pending)
    return done


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return finish_gather(start_gather(x, size, name), size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return finish_scatter(start_scatter(grad, ctx.size, ctx.name)), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return finish_scatter(start_scatter(x, size, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return finish_gather(start_gather(grad, ctx.size, ctx.name), ctx.size), None, None


class _ExchangeRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _exchange(x, size, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, ctx.size, ctx.name), None, None


def _exchange(x: Tensor, size: int, name: str) -> Tensor:
    each = [1] * size
    return _wait(_c10d.all_to_all_single(x.contiguous(), each, each, name))
