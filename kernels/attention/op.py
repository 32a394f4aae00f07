"""Attention as a differentiable op: checks, dispatch, and what it means to each backend.

`torch` and `reference` are plain PyTorch. The kernels sit behind the two custom ops of
registration.py; on GPUs the backend is chosen inside them, at run time, where the card can be
asked without breaking a graph.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from kernels.attention import select
from kernels.attention.problem import describe
from kernels.attention.reference import attention_reference
from kernels.attention.registration import attention_forward
from kernels.attention.sdpa import attention_sdpa


# fmt: off
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., documents: Tensor | None = ...,
    return_lse: Literal[False] = ..., deterministic: bool = ..., backend: str = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., documents: Tensor | None = ...,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v over the keys each query sees.

    With T queries and S keys the queries are the last T of the S positions: query t stands at
    t + S - T. A query that sees no key gets out 0 and lse -inf.

    Args:
        q: [B, T, H, D], any strides with the last dimension contiguous, D up to 256.
        k, v: [B, S, H_kv, D], H a multiple of H_kv; query head h reads kv head h * H_kv // H.
        causal: a query sees no key after its place.
        scale: default D ** -0.5.
        window: (left, right) keys a query sees before and after its place; -1 for no limit.
        alibi_slopes: [H] float32; -slope * |key - place| is added to the scores. No gradient.
        softcap: c turns scores x into c * tanh(x / c), before any bias or mask.
        sinks: [H]; one more score per head in the softmax, with value 0. Differentiable.
        documents: [B, T] int32 or int64, T == S; tokens see only keys of their own run of
            equal ids, so ids need only differ between neighbours.
        return_lse: return (out, lse) with lse [B, H, T] float32, natural log, differentiable.
        deterministic: gradients are bit-identical from run to run.
        backend: auto, hopper, triton, torch or reference; `explain` says what auto takes.

    Returns:
        out [B, T, H, D] in q's dtype, or (out, lse).

    Raises:
        ValueError: the arguments make no sense, or the backend cannot compute them.
    """
    problem = describe(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        documents=documents,
        return_lse=return_lse,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    scale = problem.head_size**-0.5 if scale is None else scale
    select.check_name(backend)
    if backend == "auto" and problem.device.type == "cpu":
        backend = select.resolve(problem, backend).forward
    elif backend in ("torch", "reference"):
        select.resolve(problem, backend)
    lse: Tensor | None
    if backend == "reference":
        out, lse = attention_reference(
            q, k, v, causal=causal, scale=scale, window=window, alibi_slopes=alibi_slopes,
            softcap=softcap, sinks=sinks, documents=documents,
            compute=torch.float64 if q.dtype == torch.float64 else torch.float32,
        )  # fmt: skip
    elif backend == "torch":
        out, lse = attention_sdpa(
            q, k, v, problem, scale=scale, alibi_slopes=alibi_slopes, documents=documents
        )
    else:
        bounds = None if documents is None else document_bounds(documents)
        out, lse = attention_forward(
            q, k, v, alibi_slopes, sinks, bounds, scale, problem.before, problem.after,
            problem.softcap, problem.deterministic, backend,
        )  # fmt: skip
    if return_lse:
        assert lse is not None  # every backend gives it when the problem asks
        return out, lse
    return out


def document_bounds(documents: Tensor) -> Tensor:
    """Where each token's run of equal ids starts and ends (exclusive): [B, 2, T] int32.

    On the device, without a look from the host.
    """
    T = documents.shape[1]
    place = torch.arange(T, dtype=torch.int32, device=documents.device)
    changed = documents[:, 1:] != documents[:, :-1]
    starts = torch.nn.functional.pad(changed, (1, 0), value=True)
    ends = torch.nn.functional.pad(changed, (0, 1), value=True)
    start = torch.where(starts, place, 0).cummax(1).values
    end = torch.where(ends, place + 1, T).flip(1).cummin(1).values.flip(1)
    return torch.stack([start, end], 1).to(torch.int32)
