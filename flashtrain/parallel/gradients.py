"""What a gradient still needs after backward: sums of partial terms, a norm, a clip.

All are a few kernels and at most one collective per axis each, and none waits for the device.
Parameters here are plain tensors: of a sharded one, this rank's part (`held_parameters`).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.model.shard import owned_rows
from flashtrain.parallel.layers import PartialRows
from flashtrain.parallel.mesh import Axis


@torch.no_grad()
def sum_partial_gradients(parameters: Iterable[Tensor], axis: Axis) -> None:
    """Complete the gradients that are sums over tensor ranks, in place.

    Replicated parameters (norms, biases of row-split layers, position tables) saw a part of the
    tokens or heads on each rank; a key/value head that several ranks hold saw a part of the query
    heads. Everything goes through one flattened all-reduce per dtype. Call it once a step, after
    the last micro-batch. Rows that only some ranks hold travel in a zero-filled buffer of all of
    them: with fewer key/value heads than ranks that is what one dense copy of them would weigh.
    """
    if axis.group is None:
        return
    by_dtype: dict[torch.dtype, list[tuple[Tensor, PartialRows]]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            for rows in _partial_rows(parameter):
                by_dtype.setdefault(parameter.grad.dtype, []).append((parameter.grad, rows))
    for pairs in by_dtype.values():
        sizes = [rows.total * grad[:1].numel() for grad, rows in pairs]
        flat = pairs[0][0].new_zeros(sum(sizes))
        slots = [
            slot.view(rows.total, *grad.shape[1:]).narrow(0, rows.at, rows.length)
            for slot, (grad, rows) in zip(flat.split(sizes), pairs, strict=True)
        ]
        terms = [grad.narrow(0, rows.local, rows.length) for grad, rows in pairs]
        torch._foreach_copy_(slots, terms)
        dist.all_reduce(flat, group=axis.group)
        torch._foreach_copy_(terms, slots)


def _partial_rows(parameter: Tensor) -> tuple[PartialRows, ...]:
    if getattr(parameter, "partial_gradient", False):
        length = parameter.size(0)
        return (PartialRows(local=0, length=length, at=0, total=length),)
    rows: tuple[PartialRows, ...] = getattr(parameter, "partial_rows", ())
    return rows


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], axis: Axis, limit: int = 2**26) -> None:
    """Replace gradients by their mean over the ranks of an axis, in place.

    limit: bytes of gradients that go through one flat all-reduce; one that is larger goes alone.
    """
    if axis.group is None:
        return
    for grads in _buckets([p.grad for p in parameters if p.grad is not None], limit):
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=axis.group)
        flat /= axis.size
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])


def _buckets(grads: list[Tensor], limit: int) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for grad in grads:
        if not buckets or grad.nbytes > room:
            buckets.append([])
            room = limit
        buckets[-1].append(grad)
        room -= grad.nbytes
    return buckets


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], axis: Axis) -> None:
    """Replace gradients by their sum over the ranks of an axis, in place, one all-reduce each.

    For the few parameters that pipeline ranks share: a tied embedding, a position table.
    """
    for parameter in parameters:
        if axis.group is not None and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=axis.group)


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor], *axes: Axis) -> Tensor:
    """The 2-norm of the whole model's gradient, 0-dim fp32 (fp64 for fp64), equal on all ranks.

    axes: those over which ranks hold different rows, not one that holds copies. Each row counts
    once, on the rank that owns it. Gradients must be complete: call `sum_partial_gradients` first.
    Raises ValueError when no parameter has a gradient.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        raise ValueError("no parameter has a gradient: run backward before taking its norm")
    rows = [row for p in with_grad for row in owned_rows(p, p.grad)]
    wide = torch.promote_types(with_grad[0].dtype, torch.float32)
    total = torch.zeros((), device=with_grad[0].device, dtype=wide)
    if rows:
        total = torch.stack(torch._foreach_norm(rows, 2, dtype=wide)).square().sum()
    for axis in axes:
        if axis.group is not None:
            dist.all_reduce(total, group=axis.group)
    return total.sqrt()


@torch.no_grad()
def clip_by_norm_(parameters: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, torch.clamp(limit / (norm + 1e-6), max=1.0))
