"""Attention over the output of one projection, [q heads | k heads | v heads], and its gradient as
one tensor: what the projection's backward multiplies with, so nobody has to join three. Rotary
positions turn q and k, and their gradients, where they lie.
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
from kernels.operation import operation, register_fake
from kernels.rope import check_table, rotate, rotate_heads, rotate_heads_


def attention_packed(
    qkv: Tensor,
    heads: int,
    *,
    causal: bool,
    rotation: Tensor | None = None,
    in_place: bool = False,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of q, k and v that lie side by side.

    Args:
        qkv: [B, T, H + 2 H_kv, D], contiguous in its last two dimensions.
        heads: H.
        rotation: [T, R] or [B, T, R] float32, the cos and sin by which q and k are turned first
            (kernels/rope). No gradient.
        in_place: the rotation may leave turned heads in qkv's own memory: for a qkv that nobody
            reads after this call. Its gradient is that of the heads as they were. A view that is
            read later shows turned heads; what autograd had kept of it, backward refuses.
        causal, alibi_slopes, documents, backend: as in `attention`.

    Returns:
        out [B, T, H, D]. The gradient of qkv is one contiguous tensor.

    Raises:
        ValueError: as `attention`; a rotation of another shape; in place in a leaf that wants a
            gradient, or in a view of one.
    """
    kv_heads = (qkv.shape[2] - heads) // 2
    if heads + 2 * kv_heads != qkv.shape[2] or kv_heads < 1:
        raise ValueError(f"{qkv.shape[2]} heads are not {heads} of q and as many of k as of v")
    if rotation is not None and in_place:
        _refuse_leaf(qkv)
    parts = _split(qkv, heads)
    if backend in ("torch", "reference") or (backend == "auto" and not qkv.is_cuda):
        if rotation is not None:
            check_table(rotation, qkv)
            q_and_k = rotate(qkv[:, :, : heads + kv_heads], rotation)
            parts = (*q_and_k.split([heads, kv_heads], dim=2), parts[2])
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
    out: Tensor = _Packed.apply(qkv, heads, rotation, in_place, *options)
    return out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, rotation: Tensor | None, in_place: bool, *options: Any
    ) -> Tensor:
        if rotation is not None and in_place:
            # not ctx.mark_dirty: as autograd knows qkv, it still holds the heads as they were
            rotate_heads_(qkv, rotation, _turning(qkv, heads))
        elif rotation is not None:
            qkv = rotate_heads(qkv, rotation, _turning(qkv, heads))
        q, k, v = _split(qkv, heads)
        out, lse = attention_forward(q, k, v, *options)
        slopes, _, bounds, *rest = options
        ctx.save_for_backward(qkv, rotation, out, lse, slopes, bounds)
        ctx.heads, ctx.rest = heads, rest
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rotation, out, lse, slopes, bounds = ctx.saved_tensors
        d_qkv = _backward(
            d_out, qkv, ctx.heads, rotation, out, lse, slopes, None, bounds, *ctx.rest
        )
        return d_qkv, *[None] * (3 + len(Options._fields))


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


def _turning(qkv: Tensor, heads: int) -> int:
    """Heads of q and k."""
    return (qkv.shape[2] + heads) // 2


def _refuse_leaf(qkv: Tensor) -> None:
    if not (qkv.requires_grad and torch.is_grad_enabled()):
        return
    owner = qkv if qkv._base is None else qkv._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"in_place would turn the heads of a leaf {list(owner.shape)} that wants a gradient: "
            "leave in_place out"
        )


@operation(
    "flashtrain::attention_backward_packed",
    schema=(
        "(Tensor d_out, Tensor qkv, int heads, Tensor? rotation, Tensor out, Tensor lse,"
        f" {SCHEMA}) -> Tensor"
    ),
)
def _backward(
    d_out: Tensor, qkv: Tensor, heads: int, rotation: Tensor | None, out: Tensor, lse: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The gradient of what `qkv`, turned by then, was before, contiguous; options: those of
    Options, without sinks and bias."""
    given = Options(*options)
    q, k, v = _split(qkv, heads)
    choice = select.resolve(problem_of(q, k, v, given), given.backend)
    if choice.backward == "hopper":
        (d_qkv,) = select.hopper().backward(
            d_out, None, q, k, v, out, lse, **for_hopper(given), packed=True
        )
    else:
        parts = run_backward(d_out, None, q, k, v, out, lse, False, given, choice)[:3]
        d_qkv = torch.cat(parts, dim=2)
    if rotation is not None:
        rotate_heads_(d_qkv, rotation, _turning(qkv, heads), back=True)
    return d_qkv


@register_fake(_backward)
def _(
    d_out: Tensor, qkv: Tensor, heads: int, rotation: Tensor | None, out: Tensor, lse: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)
