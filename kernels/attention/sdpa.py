"""The `torch` backend: PyTorch's own scaled_dot_product_attention, on any device.

On the CPU that is its fused flash kernel, forward and backward, masks included; on CUDA whatever
PyTorch picks. What its one mask argument can say is said with a mask (O(T S) memory); the rest
is refused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.problem import Problem
from kernels.attention.reference import visible


def supports(problem: Problem) -> str | None:
    """None when this backend computes the problem, else why not."""
    on_cpu = problem.device.type == "cpu"
    if problem.softcap > 0:
        return "scaled_dot_product_attention has no softcap"
    if problem.sinks:
        return "scaled_dot_product_attention has no sinks"
    if problem.dropout > 0:
        return "scaled_dot_product_attention draws its dropout differently"
    if 0 in (problem.batch, problem.queries, problem.keys):
        return "PyTorch's CPU kernel crashes on empty tensors (a division by zero in 2.13)"
    if on_cpu and problem.bias_gradient and problem.return_lse:
        return "PyTorch's CPU kernel with lse has no gradient of the bias"
    if on_cpu:
        return None
    if problem.return_lse:
        return "PyTorch's lse is not differentiable on GPUs"
    if problem.has_blind_queries:
        return f"{problem.queries} causal queries over {problem.keys} keys leave rows without a key"
    if (problem.alibi or problem.bias) and problem.dtype != torch.float32:
        return f"PyTorch would add the bias in {problem.dtype}"
    if problem.deterministic:
        return "PyTorch's backward on GPUs is not deterministic"
    return None


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    *,
    scale: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, T, H, Dv] and, where asked for, lse [B, H, T] of a supported problem."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    aligned = problem.after == 0 and problem.queries == problem.keys
    is_causal = _decided(problem.plain and aligned)
    bare = problem.plain and not problem.causal
    mask = None
    if not is_causal and not bare:
        mask = additive_mask(problem, alibi_slopes, bias, documents, key_mask)
    if problem.device.type == "cpu":  # its fused kernel takes one size of heads
        q, k, v = (F.pad(x, (0, problem.widest - x.shape[3])) for x in (q, k, v))
    if not problem.return_lse:
        grouped = _decided(problem.heads != problem.kv_heads)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return out[..., : problem.value_size].transpose(1, 2), None
    out, lse = _FlashWithLse.apply(q, k, v, mask, is_causal, scale)
    if mask is not None:  # PyTorch says 0 where a query sees no key
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return out[..., : problem.value_size].transpose(1, 2), lse


def _decided(condition: Any) -> bool:
    """A bool for PyTorch, also of sizes that torch.compile holds as symbols: a branch decides."""
    if condition:  # noqa: SIM103
        return True
    return False


def additive_mask(
    problem: Problem,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Masks and biases of a problem: [B or 1, H or 1, T, S], added to the scores.

    In the widest dtype: the CPU kernel takes a float32 mask with half-precision q.
    """
    T, S, device = problem.queries, problem.keys, problem.device
    ahead = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None] - (S - T)
    window = (problem.before, problem.after)
    seen = visible(ahead, problem.causal, window, documents, key_mask)  # [B or 1, 1, T, S]
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    if device.type != "cpu":
        dtype = problem.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    if alibi_slopes is not None:
        mask = mask - alibi_slopes.to(dtype)[:, None, None] * ahead.abs().to(dtype)
    if bias is not None:
        mask = mask + bias.to(dtype)
    return mask.masked_fill(~seen, float("-inf"))


class _FlashWithLse(torch.autograd.Function):
    """PyTorch's CPU flash kernel with its lse, differentiable in both.

    PyTorch gives lse without a gradient. In the backward pass dlse only meets delta =
    rowsum(out * d_out), as delta - dlse, so one more head dimension carries it: there q, k and v
    are 0, d_out is 1 and out is -dlse. Every other product gains an exact zero.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        D = q.shape[-1]
        one, minus_d_lse = torch.ones_like(lse), -d_lse
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _with_column(d_out, one),
            *(F.pad(x, (0, 1)) for x in (q, k, v)),
            _with_column(out, minus_d_lse),
            lse,
            0.0,
            ctx.causal,
            attn_mask=mask,
            scale=ctx.scale,
        )
        return *(g[..., :D] for g in grads), None, None, None


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """x [.., D] with one more column: [.., D + 1]."""
    return torch.cat([x, column[..., None].to(x.dtype)], -1)
