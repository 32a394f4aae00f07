"""The kernels as two torch.library ops, forward and backward, with fakes and autograd.

The schema is written out: it is the contract with torch.compile.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import select
from kernels.attention.problem import Problem
from kernels.operation import operation, register_autograd, register_fake


class Options(NamedTuple):
    """What both ops take after their tensors, in the order of the schema.

    `before` and `after` bound the keys a query sees around its place, -1 for no limit; causal is
    after = 0. `bounds` [B, 2, T] and `key_range` [B, 2] are those of ranges.py.
    """

    alibi_slopes: Tensor | None
    sinks: Tensor | None
    bounds: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    key_range: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    before: int
    after: int
    softcap: float
    dropout: float
    deterministic: bool
    backend: str


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
N_TENSORS = 7  # of the options, first in their order
SCHEMA = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? bounds, Tensor? bias, Tensor? key_mask,"
    " Tensor? key_range, Tensor? dropout_seed, float scale, int before, int after, float softcap,"
    " float dropout, bool deterministic, str backend"
)


@operation(
    "flashtrain::attention_forward",
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, H, T] of q [B, T, H, D], k [B, S, H_kv, D], v [.., Dv].

    Args:
        options: those of Options.
    """
    given = Options(*options)
    return run_forward(q, k, v, given, select.resolve(problem_of(q, k, v, given), given.backend))


@operation(
    "flashtrain::attention_backward",
    schema=(
        "(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" bool bias_gradient, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    bias_gradient: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d_sinks and d_bias; the last two are empty where there is nothing to give."""
    given = Options(*options)
    choice = select.resolve(problem_of(q, k, v, given), given.backend)
    dq, dk, dv, d_sinks, d_bias = run_backward(
        d_out, d_lse, q, k, v, out, lse, bias_gradient, given, choice
    )
    d_sinks = q.new_empty(0) if d_sinks is None else d_sinks  # an op cannot return None
    d_bias = q.new_empty(0) if d_bias is None else d_bias
    return dq, dk, dv, d_sinks, d_bias


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, given: Options, choice: select.Choice
) -> tuple[Tensor, Tensor]:
    """The forward op on real tensors, by the backend that was chosen."""
    result: tuple[Tensor, Tensor]
    if choice.forward == "hopper":
        result = select.hopper().forward(q, k, v, **for_hopper(given))
    else:
        result = _portable().forward(q, k, v, _features(given))
    return result


def run_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    given: Options,
    choice: select.Choice,
) -> Gradients:
    """The backward op on real tensors: dq, dk, dv, d_sinks or None, d_bias or None."""
    gradients: Gradients
    if choice.backward == "hopper":
        dq, dk, dv, *d_sinks = select.hopper().backward(
            d_out, d_lse, q, k, v, out, lse, **for_hopper(given), deterministic=given.deterministic
        )
        gradients = dq, dk, dv, d_sinks[0] if d_sinks else None, None
    else:
        gradients = _portable().backward(
            d_out, d_lse, q, k, v, out, lse, _features(given), bias_gradient=bias_gradient
        )
    return gradients


@register_fake(attention_forward)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    return q.new_empty((B, T, H, v.shape[3])), q.new_empty((B, H, T), dtype=torch.float32)


@register_fake(attention_backward)
def _(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    given = Options(*options)
    wanted = (given.sinks, given.bias if bias_gradient else None)
    more = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *more


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    q, k, v, *options = inputs
    ctx.set_materialize_grads(False)  # an unused lse then costs no zeros
    ctx.save_for_backward(q, k, v, *output, *options[:N_TENSORS])
    ctx.numbers = options[N_TENSORS:]


def gradients_of(
    ctx: Any, backward: Callable[..., Gradients], d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A gradient for each input of the forward op, by the op or by what it runs."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    given = Options(*tensors, *ctx.numbers)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    bias_gradient = ctx.needs_input_grad[3 + Options._fields.index("bias")]
    dq, dk, dv, d_sinks, d_bias = backward(d_out, d_lse, q, k, v, out, lse, bias_gradient, given)
    given_back = {
        "sinks": None if given.sinks is None else d_sinks,
        "bias": d_bias if bias_gradient else None,
    }
    return dq, dk, dv, *(given_back.get(name) for name in Options._fields)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradients_of(ctx, backward_op, d_out, d_lse)


def backward_op(*arguments: Any) -> Gradients:
    """The backward op, its options in one argument."""
    *tensors, given = arguments
    result: Gradients = attention_backward(*tensors, *given)
    return result


register_autograd(attention_forward, _backward, setup_context=save)


def problem_of(q: Tensor, k: Tensor, v: Tensor, given: Options) -> Problem:
    """The problem again, from what reaches the op; its meaning was checked in `attention`."""
    B, T, H, D = q.shape
    return Problem(
        batch=B,
        queries=T,
        keys=k.shape[1],
        heads=H,
        kv_heads=k.shape[2],
        head_size=D,
        value_size=v.shape[3],
        dtype=q.dtype,
        device=q.device,
        strides=(q.stride(), k.stride(), v.stride()),
        causal=given.after == 0,
        before=given.before,
        after=given.after,
        alibi=given.alibi_slopes is not None,
        softcap=given.softcap,
        sinks=given.sinks is not None,
        documents=given.bounds is not None,
        bias=given.bias is not None,
        bias_gradient=False,
        key_mask=given.key_mask is not None,
        dropout=given.dropout,
        return_lse=True,
        deterministic=given.deterministic,
    )


def for_hopper(given: Options) -> dict[str, Any]:
    """The options as the Hopper kernels take them."""
    return dict(
        causal=given.after == 0,
        scale=given.scale,
        alibi_slopes=given.alibi_slopes,
        before=given.before,
        after=given.after,
        softcap=given.softcap,
        sinks=given.sinks,
        bounds=given.bounds,
    )


def _features(given: Options) -> Any:
    """The options as the portable kernels take them, which are always deterministic: vectors with
    nothing between their numbers."""
    slopes, sinks, bounds = (
        None if x is None else x.contiguous()
        for x in (given.alibi_slopes, given.sinks, given.bounds)
    )
    return _portable().Features(
        scale=given.scale,
        before=given.before,
        after=given.after,
        softcap=given.softcap,
        alibi_slopes=slopes,
        sinks=sinks,
        bounds=bounds,
        bias=given.bias,
        key_mask=given.key_mask,
        key_range=given.key_range,
        dropout=given.dropout,
        dropout_seed=given.dropout_seed,
    )


def _portable() -> ModuleType:
    """Imported at the first call: `import kernels` must work where Triton is absent."""
    from kernels.attention import portable

    return portable
