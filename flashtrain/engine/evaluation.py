"""Forwards without a backward, as every engine does them."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.data.loader import Batch
from flashtrain.parallel.loss import IGNORED
from flashtrain.parallel.mesh import SINGLE, Axis


@torch.no_grad()
def mean_loss(
    summed_loss: Callable[..., Tensor],
    batches: Iterable[Batch],
    tokens: Axis,
    device: torch.device,
    pipeline: Axis = SINGLE,
) -> Tensor:
    """Mean loss per valid token over the batches of all ranks, 0-dim fp32.

    tokens: the axis of ranks whose batches hold different tokens. pipeline: that of ranks with the
    same tokens, of which one has their loss and the others 0.
    """
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    for batch in batches:
        sums[0] += summed_loss(*batch)
        sums[1] += (batch.labels != IGNORED).sum()
    sum_over(pipeline, sums[:1])
    sum_over(tokens, sums)
    return (sums[0] / sums[1].clamp(min=1)).float()


def sum_over(axis: Axis, tensor: Tensor) -> None:
    """Sum over the ranks of an axis, in place."""
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
