"""The kernels as two torch.library ops, forward and backward, with fakes and autograd.

The schema is written out: it is the contract with torch.compile. `before` and `after` bound the
keys a query sees around its place, -1 for no limit; causal is after = 0. `bounds` [B, 2, T] is
op.document_bounds.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.attention import select
from kernels.attention.problem import Problem

_OPTIONS = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? bounds, float scale, int before, int after,"
    " float softcap, bool deterministic, str backend"
)


@torch.library.custom_op(
    "flashtrain::attention_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    before: int,
    after: int,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T] of q [B, T, H, D], k and v [B, S, H_kv, D]."""
    options = (alibi_slopes, sinks, bounds, scale, before, after, softcap)
    choice = select.resolve(_problem(q, k, v, *options, deterministic), backend)
    if choice.forward == "hopper":
        result: tuple[Tensor, Tensor] = select.hopper().forward(
            q, k, v, causal=after == 0, scale=scale, alibi_slopes=alibi_slopes
        )
        return result
    portable = _portable()
    features = portable.Features(scale, before, after, softcap, alibi_slopes, sinks, bounds)
    result = portable.forward(q, k, v, features)
    return result


@torch.library.custom_op(
    "flashtrain::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    before: int,
    after: int,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and d_sinks; the last is empty without sinks, as an op cannot return None."""
    options = (alibi_slopes, sinks, bounds, scale, before, after, softcap)
    choice = select.resolve(_problem(q, k, v, *options, deterministic), backend)
    if choice.backward == "hopper":
        dq, dk, dv = select.hopper().backward(
            d_out, d_lse, q, k, v, out, lse,
            causal=after == 0, scale=scale, alibi_slopes=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv, q.new_empty(0)
    portable = _portable()
    features = portable.Features(scale, before, after, softcap, alibi_slopes, sinks, bounds)
    dq, dk, dv, d_sinks = portable.backward(d_out, d_lse, q, k, v, out, lse, features)
    return dq, dk, dv, q.new_empty(0) if d_sinks is None else d_sinks


@attention_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@attention_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    d_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, alibi_slopes, sinks, bounds, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)  # an unused lse then costs no zeros
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, sinks, bounds)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, alibi_slopes, sinks, bounds = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    dq, dk, dv, d_sinks = attention_backward(
        d_out, d_lse, q, k, v, out, lse, alibi_slopes, sinks, bounds, *ctx.numbers
    )
    return dq, dk, dv, None, None if sinks is None else d_sinks, *(None for _ in range(7))


attention_forward.register_autograd(_backward, setup_context=_save)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    before: int,
    after: int,
    softcap: float,
    deterministic: bool,
) -> Problem:
    """The problem again, from what reaches the op; its meaning was checked in `attention`."""
    B, T, H, D = q.shape
    return Problem(
        batch=B,
        queries=T,
        keys=k.shape[1],
        heads=H,
        kv_heads=k.shape[2],
        head_size=D,
        dtype=q.dtype,
        device=q.device,
        strides=(q.stride(), k.stride(), v.stride()),
        causal=after == 0,
        before=before,
        after=after,
        alibi=alibi_slopes is not None,
        softcap=softcap,
        sinks=sinks is not None,
        documents=bounds is not None,
        return_lse=True,
        deterministic=deterministic,
    )


def _portable() -> ModuleType:
    """Imported at the first call: `import kernels` must work where Triton is absent."""
    from kernels.attention import portable

    return portable
