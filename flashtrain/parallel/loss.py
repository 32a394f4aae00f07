"""Cross-entropy over a vocabulary that is split over the tensor ranks, with or without logits.

Dims: N tokens, D width, V_local this rank's vocabulary, n ranks.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.parallel.collectives import all_gather, gather_sequence
from flashtrain.parallel.mesh import Axis
from kernels.linear_cross_entropy import VocabularyShard, linear_cross_entropy

IGNORED = -100  # the label of a token that does not count, as in torch

# Logits are widened to fp32 this many at a time (128 MiB), never all at once: for 16k tokens and
# 50k words the whole would be 3.3 GB. Under torch.compile nothing is widened in memory anyway.
CHUNK = 2**25


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    axis: Axis,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[label], without the logits in memory.

    forward   X = concat over s of x_s, along T;  Y_r = X W_r^T, by chunks of tokens;
              lse and the label's logit from all ranks' shards, one small gather a chunk
    backward  dx_r = (sum over s of dY_s W_s)[part r of T];  dW_r = dY_r^T X

    Args:
        hidden: x_r [B, T/n, D], this rank's part of the sequence.
        weight: W_r [V_local, D], words from `axis.rank * V_local` on.
        labels: [B, T] int64 in the whole vocabulary; -100 does not count.
        softcap, z_loss: see `linear_cross_entropy`.

    Returns:
        0-dim fp32 tensor (fp64 for fp64), equal on all ranks.
    """
    shard = None
    if axis.group is not None:
        words = weight.size(0)

        def combine(own: Tensor) -> Tensor:
            lses, picks = all_gather(own, axis.size, axis.name).unbind(1)  # [n, N] each
            return torch.stack([lses.logsumexp(0), picks.sum(0)])

        shard = VocabularyShard(axis.rank * words, axis.size * words, combine)
    return linear_cross_entropy(
        gather_sequence(hidden, axis), weight, labels, ignore_index=IGNORED, softcap=softcap,
        z_loss=z_loss, shard=shard,
    )  # fmt: skip


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, axis: Axis, vocabulary_start: int = 0
) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], exact over vocabulary shards.

    Args:
        logits: [..., V_local], words `vocabulary_start` to `vocabulary_start + V_local`; computed
            in fp32 (fp64 stays fp64) whatever their dtype.
        labels: [...] int64, numbered in the whole vocabulary; -100 does not count. A label outside
            [0, vocabulary) otherwise is undefined, as nothing here waits for the device to look.
        axis: the ranks that hold the shards. Logits of padding words count as any other.

    Returns:
        0-dim tensor, equal on all ranks. The gradient is that of this rank's logits, in their
        dtype. Between forward and backward only `logits` and [N] fp32 are kept.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need labels of shape "
            f"{tuple(logits.shape[:-1])}, not {tuple(labels.shape)}"
        )
    size, name = (1, "") if axis.group is None else (axis.size, axis.name)
    loss: Tensor = _CrossEntropySum.apply(
        logits.reshape(-1, logits.size(-1)), labels.flatten(), vocabulary_start, size, name
    )
    return loss


class _CrossEntropySum(torch.autograd.Function):
    """loss = sum over counted tokens of lse - logit[label]; dlogit = softmax - onehot(label)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, start: int, size: int, name: str
    ) -> Tensor:
        local = labels - start
        here = (local >= 0) & (local < logits.size(-1))  # a label -100 is on no rank
        local = local.clamp(0, logits.size(-1) - 1).unsqueeze(-1)  # [N, 1]
        wide = torch.promote_types(logits.dtype, torch.float32)

        picked = logits.gather(-1, local).squeeze(-1).to(wide).masked_fill(~here, 0)  # [N]
        lse = torch.cat([c.to(wide).logsumexp(-1) for c in logits.split(_rows(logits))])  # [N]
        if size > 1:  # both in one gather: [n, 2, N]
            lses, picks = all_gather(torch.stack([lse, picked]), size, name).unbind(1)
            lse, picked = lses.logsumexp(0), picks.sum(0)

        counted = labels != IGNORED
        ctx.save_for_backward(logits, local, here, counted, lse)
        return (lse - picked).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, here, counted, lse = ctx.saved_tensors
        scale = (grad_loss * counted.to(lse.dtype)).unsqueeze(-1)  # [N, 1]
        total = lse.unsqueeze(-1)
        grad, rows = torch.empty_like(logits), _rows(logits)
        parts = zip(*(part.split(rows) for part in (grad, logits, total, scale)), strict=True)
        for out, chunk, its_total, its_scale in parts:
            out.copy_((chunk - its_total).exp_().mul_(its_scale))  # the subtraction widens
        # the label's column once more, as a write: adding -1 into the wide copy would make the
        # compiler keep that copy, all of it
        onehot = here.unsqueeze(-1).to(lse.dtype)
        at_label = ((logits.gather(-1, local) - total).exp() - onehot) * scale
        grad.scatter_(-1, local, at_label.to(grad.dtype))
        return grad, None, None, None, None


def _rows(logits: Tensor) -> int:
    """Rows of one chunk; all of them under torch.compile, which fuses the widening away."""
    if torch.compiler.is_compiling():
        return max(logits.size(0), 1)
    return max(CHUNK // logits.size(-1), 1)
