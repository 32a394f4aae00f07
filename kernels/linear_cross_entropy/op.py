"""Linear + cross-entropy as a differentiable op: checks, choice of chunk and rows, autograd."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.chunked import chunked, rows_of
from kernels.linear_cross_entropy.problem import Terms, VocabularyShard, describe
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.linear_cross_entropy.tiles import chunk_tokens


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of token losses of the logits hidden weight^T, which are never in memory as a whole.

    loss = sum over tokens with label != ignore_index of lse - x[label] + z_loss lse^2, where x are
    the logits, capped, and lse = logsumexp(x). Exact: every gradient term counts.

    The gradients are computed with the loss (three products in all, nothing twice) and kept until
    backward: dW in fp32, dH in hidden's dtype. Without gradients only the loss is computed.

    Args:
        hidden: [.., D], decides the dtype of the products.
        weight: [V, D] of any float dtype; its gradient has that dtype, summed in fp32.
        labels: [..] int64 or int32, numbered in the whole vocabulary.
        ignore_index: tokens with this label neither count nor get a gradient.
        softcap: c turns logits y into c tanh(y / c).
        z_loss: weight of lse^2 (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
        shard: weight holds a part of the vocabulary. The loss is then that of the whole, equal on
            all shards; the gradient of hidden is this shard's term of a sum over them.
        chunk: tokens whose logits are in memory at a time; default from tiles.py.
        backend: auto, triton, torch or reference; auto is triton on CUDA, torch elsewhere.

    Returns:
        0-dim tensor, fp32 (fp64 for fp64 hidden).

    Raises:
        ValueError: arguments that make no sense; on the CPU, a label out of range, which on other
            devices makes the loss NaN. RuntimeError: a second backward through one call.
    """
    terms = describe(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        z_loss=z_loss,
        shard=shard,
        chunk=chunk,
        backend=backend,
    )
    if backend == "reference":
        if shard is not None:
            raise ValueError("backend='reference' holds the whole vocabulary: it takes no shard")
        return linear_cross_entropy_reference(
            hidden, weight.to(hidden.dtype), labels, ignore_index=ignore_index, softcap=softcap,
            z_loss=z_loss, compute=torch.promote_types(hidden.dtype, torch.float32),
        )  # fmt: skip
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.flatten().contiguous()
    rows = rows_of(hidden.device, hidden.dtype, backend)
    plan = _Plan(terms, shard, chunk or chunk_tokens(hidden.size(0)), rows)
    return _apply(hidden, weight, labels, plan)


@dataclass(frozen=True)
class _Plan:
    """All of a call but its tensors."""

    terms: Terms
    shard: VocabularyShard | None
    chunk: int
    rows: ModuleType


@torch.compiler.disable  # a loop over products of a library: nothing there for a compiler to fuse
def _apply(hidden: Tensor, weight: Tensor, labels: Tensor, plan: _Plan) -> Tensor:
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, plan, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The backward only hands over what the forward computed, times the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, plan: _Plan, records: bool
    ) -> Tensor:
        # needs_input_grad does not know of torch.no_grad
        wants_hidden, wants_weight = (records and need for need in ctx.needs_input_grad[:2])
        loss, d_hidden, d_weight = chunked(
            hidden, weight, labels, plan.terms, plan.shard, plan.chunk, plan.rows,
            wants_hidden=wants_hidden, wants_weight=wants_weight,
        )  # fmt: skip
        # not saved tensors: they are scaled in place and must not outlive the backward
        ctx.gradients = [(d_hidden, hidden.dtype), (d_weight, weight.dtype)]
        ctx.rows = plan.rows
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy hands its gradients over once: call it again for a second "
                "backward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if grad is None else ctx.rows.scale_into(grad, grad_loss, dtype)
            for grad, dtype in gradients
        ]
        return *scaled, None, None, None
