"""Linear + cross-entropy as plain PyTorch: the definition, with all logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Sum over tokens whose label is not ignore_index of lse - logit[label] + z_loss lse^2.

    logits = hidden weight^T, then softcap tanh(logits / softcap); lse = logsumexp(logits).

    Args:
        hidden: [.., D]; weight: [V, D]; labels: [..] int64.
        compute: every step is in this dtype; the result has it.
    """
    logits = F.linear(hidden.to(compute), weight.to(compute)).flatten(0, -2)  # [N, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = labels.flatten().long()
    loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        lse = logits.logsumexp(-1).masked_fill(flat == ignore_index, 0)
        loss = loss + z_loss * lse.square().sum()
    return loss
