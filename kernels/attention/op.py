"""Attention as a differentiable op: checks, dispatch, and what it means to each backend.

`torch` and `reference` are plain PyTorch. The kernels sit behind the two custom ops of
registration.py; for a compiler the backend is chosen inside them, at run time, where the card can
be asked without breaking a graph. Plain eager calls go around the ops, by eager.py.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from kernels.attention import select
from kernels.attention.dropout import seed_tensor
from kernels.attention.eager import attention_eager, is_plain, layout
from kernels.attention.problem import Problem, describe
from kernels.attention.ranges import document_bounds, document_ids, key_range
from kernels.attention.reference import attention_reference
from kernels.attention.registration import Options, attention_forward
from kernels.attention.sdpa import attention_sdpa


# fmt: off
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    documents: Tensor | None = ..., key_mask: Tensor | None = ..., dropout: float = ...,
    dropout_seed: int | Tensor | None = ...,
    return_lse: Literal[False] = ..., deterministic: bool = ..., backend: str = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    documents: Tensor | None = ..., key_mask: Tensor | None = ..., dropout: float = ...,
    dropout_seed: int | Tensor | None = ...,
    return_lse: Literal[True], deterministic: bool = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
# fmt: on


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v over the keys each query sees.

    With T queries and S keys the queries are the last T of the S positions: query t stands at
    t + S - T. A query that sees no key gets out 0 and lse -inf.

    Args:
        q: [B, T, H, D], any strides with the last dimension contiguous, D up to 256.
        k, v: [B, S, H_kv, D] and [B, S, H_kv, Dv], H a multiple of H_kv, Dv up to 256; query
            head h reads kv head h * H_kv // H.
        causal: a query sees no key after its place.
        scale: default D ** -0.5.
        window: (left, right) keys a query sees before and after its place; -1 for no limit.
        alibi_slopes: [H] float32; -slope * |key - place| is added to the scores. No gradient.
        bias: [B or 1, H or 1, T or 1, S], floating point, added to the scores; -inf hides a key.
            Differentiable: the gradient is summed over the dimensions of size 1, in float32.
        softcap: c turns scores x into c * tanh(x / c), before any bias or mask.
        sinks: [H]; one more score per head in the softmax, with value 0. Differentiable.
        documents: int32 or int64, T == S; tokens see only keys of their own document. Either ids
            [B, T], where a document is a run of equal ids, so that ids need only differ between
            neighbours; or cu_seqlens [documents + 1], the first tokens of the documents among
            the B * T in row-major order and the end of the last; or what `document_bounds` made of
            either, [B, 2, T] int32, which saves finding the bounds again in every layer.
        key_mask: [B, S] bool, True for keys that may be seen, False for padding; any pattern.
        dropout: the probability that a weight of the softmax is dropped; those kept are scaled by
            1 / (1 - dropout). lse is that of the undropped softmax.
        dropout_seed: an int or an int64 tensor of one element on the device, and all that the
            choice of weights depends on (see dropout.py); None draws one from PyTorch's generator.
        return_lse: return (out, lse) with lse [B, H, T] float32, natural log, differentiable.
        deterministic: gradients are bit-identical from run to run.
        backend: auto, hopper, triton, torch or reference; `explain` says what auto takes.

    Returns:
        out [B, T, H, Dv] in q's dtype, or (out, lse).

    Raises:
        ValueError: the arguments make no sense, or the backend cannot compute them.
    """
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    tensors = (q, k, v, alibi_slopes, bias, sinks, documents, key_mask, dropout_seed)
    plain = is_plain(*tensors)
    key, judged = None, None
    if plain:  # the same checks give the same answer for tensors laid out alike
        key = (
            causal, scale, None if window is None else tuple(window), softcap, dropout,
            return_lse, deterministic, backend, torch.is_grad_enabled(), *map(layout, tensors),
        )  # fmt: skip
        judged = _judged.get(key)
    if judged is None:
        problem = describe(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            window=window,
            alibi_slopes=alibi_slopes,
            bias=bias,
            softcap=softcap,
            sinks=sinks,
            documents=documents,
            key_mask=key_mask,
            dropout=dropout,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            deterministic=deterministic,
        )
        select.check_name(backend)
        on_cpu = backend == "auto" and problem.device.type == "cpu"
        now = plain or on_cpu or backend in ("torch", "reference")
        judged = problem, select.resolve(problem, backend) if now else None
        if key is not None:
            _remember(key, judged)
    problem, choice = judged
    scale = problem.head_size**-0.5 if scale is None else scale
    name = backend if choice is None else choice.forward
    bounds = None
    if documents is not None and name in ("torch", "reference"):
        documents = document_ids(documents, problem.batch, problem.queries)
    elif documents is not None:
        bounds = document_bounds(documents, problem.batch, problem.queries)
    seed = seed_tensor(dropout_seed, q.device) if dropout > 0 else None
    lse: Tensor | None
    if name == "reference":
        out, lse = attention_reference(
            q, k, v, causal=causal, scale=scale, window=window, alibi_slopes=alibi_slopes,
            bias=bias, softcap=softcap, sinks=sinks, documents=documents, key_mask=key_mask,
            dropout=dropout, dropout_seed=seed,
            compute=torch.float64 if q.dtype == torch.float64 else torch.float32,
        )  # fmt: skip
    elif name == "torch":
        out, lse = attention_sdpa(
            q, k, v, problem, scale=scale, alibi_slopes=alibi_slopes, bias=bias,
            documents=documents, key_mask=key_mask,
        )  # fmt: skip
    else:
        options = Options(
            alibi_slopes, sinks, bounds, bias, key_mask,
            None if key_mask is None else key_range(key_mask), seed,
            scale, problem.before, problem.after, problem.softcap, dropout, deterministic, backend,
        )  # fmt: skip
        if choice is None:
            out, lse = attention_forward(q, k, v, *options)
        else:
            out, lse = attention_eager(q, k, v, options, choice)
    if return_lse:
        assert lse is not None  # every backend gives it when the problem asks
        return out, lse
    return out


_judged: dict[object, tuple[Problem, select.Choice | None]] = {}
MOST_JUDGED = 4096  # a few KB each; sequences of many lengths must not fill the memory


def _remember(key: object, judged: tuple[Problem, select.Choice | None]) -> None:
    if len(_judged) >= MOST_JUDGED:
        _judged.clear()
    _judged[key] = judged
