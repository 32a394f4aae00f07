"""The backward pass of one block of keys, for whoever runs attention block by block.

Softmax over all keys is a sum over blocks of keys, weighted by exp(lse of the block - lse of all).
So with `out` and `lse` of all keys, each block's gradients are the same three products over its own
scores, and no block is computed forward again:

    P = exp(S - lse)   delta = rowsum(out * d_out)   dS = P * (d_out V^T - delta)
    dV = P^T d_out     dK = scale dS^T Q             dQ = scale dS K, a term of a sum over blocks
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import select
from kernels.attention.problem import describe
from kernels.attention.ranges import document_bounds, document_ids, key_range
from kernels.attention.registration import Options, run_backward
from kernels.attention.sdpa import additive_mask


def attention_block_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (this block's term), dk and dv, in the dtypes of q, k and v. No gradient of its own.

    Args:
        d_out, out: [B, T, H, Dv] over all keys that the queries see, in q's dtype.
        lse: [B, H, T] float32 over all keys, natural log, as `attention` returns it; +inf for a
            query that is to see no key of this block.
        q, k, v: [B, T, H, D], [B, S, H_kv, D], [B, S, H_kv, Dv] of the block.
        causal: the queries are the last T of the S places, and see no key after their own.
        scale, alibi_slopes, documents, key_mask, backend: as for `attention`.

    Raises:
        ValueError: a causal block of more queries than keys, or a backend that cannot compute it.
    """
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"a causal block of {q.shape[1]} queries and {k.shape[1]} keys has queries that see"
            " nothing: leave them out"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    problem = describe(
        q, k, v, causal=causal, scale=scale, alibi_slopes=alibi_slopes, documents=documents,
        key_mask=key_mask, return_lse=True, deterministic=deterministic,
    )  # fmt: skip
    choice = select.resolve(problem, backend)
    scale = problem.head_size**-0.5 if scale is None else scale
    if choice.backward in ("torch", "reference"):
        square = choice.backward == "torch" and problem.plain and q.shape[1] == k.shape[1]
        mask = None
        if not problem.plain or (causal and not square):
            ids = None if documents is None else document_ids(documents, *q.shape[:2])
            mask = additive_mask(problem, alibi_slopes, None, ids, key_mask)
        if choice.backward == "torch":
            return _torch_backward(d_out, q, k, v, out, lse, causal and square, mask, scale)
        return _reference_backward(d_out, q, k, v, out, lse, mask, scale)
    bounds = None if documents is None else document_bounds(documents, *q.shape[:2])
    options = Options(
        alibi_slopes, None, bounds, None, key_mask,
        None if key_mask is None else key_range(key_mask), None,
        scale, problem.before, problem.after, 0.0, 0.0, deterministic, backend,
    )  # fmt: skip
    dq, dk, dv, _, _ = run_backward(d_out, None, q, k, v, out, lse, False, options, choice)
    return dq, dk, dv


def _torch_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PyTorch's CPU flash kernel, whose tensors are [B, H, T, D] with one D for all."""
    widest = max(q.shape[3], v.shape[3])
    d_out, *operands = (
        F.pad(x.transpose(1, 2), (0, widest - x.shape[3])) for x in (d_out, q, k, v, out)
    )
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, *operands, lse.contiguous(), 0.0, causal, attn_mask=mask, scale=scale
    )
    dq, dk, dv = (
        grad[..., : x.shape[3]].transpose(1, 2) for grad, x in zip(grads, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _reference_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formulas above, all [T, S] scores in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = k.shape[2]  # K; query heads are [K, G]
    grouped_q, grouped_out, grouped_d_out = (
        x.to(wide).unflatten(2, (heads, -1)) for x in (q, out, d_out)
    )
    s = scale * torch.einsum("btkgd,bskd->bkgts", grouped_q, k.to(wide))
    if mask is not None:  # [B or 1, H or 1, T, S]
        s = (s.flatten(1, 2) + mask).view_as(s)
    p = torch.exp(s - lse.to(wide).unflatten(1, (heads, -1))[..., None])
    delta = (grouped_out * grouped_d_out).sum(-1).permute(0, 2, 3, 1)  # [B, K, G, T]
    ds = p * (torch.einsum("btkgd,bskd->bkgts", grouped_d_out, v.to(wide)) - delta[..., None])
    dq = scale * torch.einsum("bkgts,bskd->btkgd", ds, k.to(wide)).flatten(2, 3)
    dk = scale * torch.einsum("bkgts,btkgd->bskd", ds, grouped_q)
    dv = torch.einsum("bkgts,btkgd->bskd", p, grouped_d_out)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
