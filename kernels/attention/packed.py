"""Attention over the output of one projection, [q heads | k heads | v heads], and its gradient as
one tensor: what the projection's backward multiplies with, so nobody has to join three.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import select
from kernels.attention.op import attention
from kernels.attention.problem import describe
from kernels.attention.ranges import document_bounds
from kernels.attention.registration import (
    SCHEMA,
    Options,
    attention_forward,
    for_hopper,
    problem_of,
    run_backward,
)


def attention_packed(
    qkv: Tensor,
    heads: int,
    *,
    causal: bool,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of q, k and v that lie side by side.

    Args:
        qkv: [B, T, H + 2 H_kv, D], contiguous in its last two dimensions.
        heads: H.
        causal, alibi_slopes, documents, backend: as in `attention`.

    Returns:
        out [B, T, H, D]. The gradient of qkv is one contiguous tensor.

    Raises:
        ValueError: as `attention`.
    """
    kv_heads = (qkv.shape[2] - heads) // 2
    if heads + 2 * kv_heads != qkv.shape[2] or kv_heads < 1:
        raise ValueError(f"{qkv.shape[2]} heads are not {heads} of q and as many of k as of v")
    parts = qkv.split([heads, kv_heads, kv_heads], dim=2)
    if not qkv.is_cuda or backend in ("torch", "reference"):
        return attention(
            *parts, causal=causal, alibi_slopes=alibi_slopes, documents=documents, backend=backend
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    problem = describe(
        *parts, causal=causal, scale=None, window=None, alibi_slopes=alibi_slopes, bias=None,
        softcap=None, sinks=None, documents=documents, key_mask=None, dropout=0.0,
        dropout_seed=None, return_lse=False, deterministic=deterministic,
    )  # fmt: skip
    select.check_name(backend)
    bounds = None
    if documents is not None:
        bounds = document_bounds(documents, problem.batch, problem.queries)
    options = Options(
        alibi_slopes, None, bounds, None, None, None, None, problem.head_size**-0.5,
        problem.before, problem.after, 0.0, 0.0, deterministic, backend,
    )  # fmt: skip
    out: Tensor = _Packed.apply(qkv, heads, *options)
    return out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, *options: Any) -> Tensor:
        q, k, v = _split(qkv, heads)
        out, lse = attention_forward(q, k, v, *options)
        slopes, _, bounds, *rest = options
        ctx.save_for_backward(qkv, out, lse, slopes, bounds)
        ctx.heads, ctx.rest = heads, rest
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, slopes, bounds = ctx.saved_tensors
        d_qkv = _backward(d_out, qkv, ctx.heads, out, lse, slopes, None, bounds, *ctx.rest)
        return d_qkv, None, *[None] * len(Options._fields)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


@torch.library.custom_op(
    "flashtrain::attention_backward_packed",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor qkv, int heads, Tensor out, Tensor lse, {SCHEMA}) -> Tensor",
)
def _backward(
    d_out: Tensor, qkv: Tensor, heads: int, out: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    """The gradient of qkv, contiguous; options: those of Options, without sinks and bias."""
    given = Options(*options)
    q, k, v = _split(qkv, heads)
    choice = select.resolve(problem_of(q, k, v, given), given.backend)
    if choice.backward == "hopper":
        (d_qkv,) = select.hopper().backward(
            d_out, None, q, k, v, out, lse, **for_hopper(given), packed=True
        )
        return d_qkv
    parts = run_backward(d_out, None, q, k, v, out, lse, False, given, choice)[:3]
    return torch.cat(parts, dim=2)


@_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, heads: int, out: Tensor, lse: Tensor, *options: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)
