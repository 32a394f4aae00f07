"""Attention of a few new tokens over a key/value cache: checks, and the torch.library op.

Dims: B batch, T query tokens, H heads, H_kv key/value heads, S room in the cache, D / Dv head size.
Meaning: decode_reference.py. Kernels: portable/decode.py. No gradient: `attention` has one.
"""

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kernels.attention import tiles
from kernels.attention.decode_reference import decode_reference
from kernels.attention.problem import FARTHEST, LARGEST_HEAD, UNBOUNDED
from kernels.operation import operation, register_fake

BACKENDS = ("auto", "triton", "reference")
SMALLEST_PAGE = 16


# fmt: off
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    page_table: Tensor | None = ..., scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    page_table: Tensor | None = ..., scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What `attention(..., causal=True)` gives for the last T tokens of sequences in a cache.

    Sequence b holds lengths[b] tokens, its T queries included: query t stands at
    lengths[b] - T + t and sees no key after its place. Queries before the sequence's start (all
    of them at length 0) get out 0 and lse -inf, or the sink. What the cache holds past a
    sequence's end is never used, NaN neither.

    Nothing is read back to the host and the launch depends on sizes alone, so a captured CUDA
    graph serves all lengths.

    Args:
        q: [B, T, H, D], any strides with the last dimension contiguous, D up to 256. T and the
            grouped heads share a tile: K and V are read once per 64 rows of T * H / H_kv.
        k_cache, v_cache: [B, S, H_kv, D] and [B, S, H_kv, Dv]; with page_table
            [n_pages, page_size, H_kv, ..], page_size a power of two from 16 on. Strides as q's.
        lengths: [B] int32, on the device, 0 to the room there is; past it they count as full.
        page_table: [B, pages_per_sequence] int32: the pages of a sequence in order. Only those
            that its length needs are looked at, and they must exist: nothing checks them.
        scale: default D ** -0.5.
        window: (left, right) keys a query sees before and after its place; -1 for no limit.
        alibi_slopes: [H] float32; -slope * (place - key) is added to the scores.
        softcap: c turns scores x into c * tanh(x / c), before ALiBi and mask.
        sinks: [H]; one more score per head in the softmax, with value 0.
        return_lse: return (out, lse) with lse [B, H, T] float32, natural log, sinks included.
        backend: auto (triton on GPUs, reference on the CPU), triton or reference.

    Returns:
        out [B, T, H, Dv] in q's dtype, or (out, lse).

    Raises:
        ValueError: the arguments make no sense, or the backend cannot compute them.
    """
    _check_tensors(q, k_cache, v_cache)
    _check_cache(q, k_cache, v_cache, lengths, page_table)
    before = _check_options(q, scale, window, alibi_slopes, softcap, sinks)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} of decoding is not one of {', '.join(BACKENDS)}")
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k_cache, v_cache, sinks)
    ):
        raise ValueError("decoding has no gradient: use torch.no_grad(), or attention() to train")
    if backend == "auto":
        backend = "reference" if q.device.type == "cpu" else "triton"
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        out, lse = decode_reference(
            q, k_cache, v_cache, lengths, page_table=page_table, scale=scale, before=before,
            alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
            compute=torch.float64 if q.dtype == torch.float64 else torch.float32,
        )  # fmt: skip
    else:
        out, lse = attention_decode_op(
            q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks, scale, before,
            softcap or 0.0,
        )  # fmt: skip
    return (out, lse) if return_lse else out


@operation(
    "flashtrain::attention_decode",
    schema=(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? page_table,"
        " Tensor? alibi_slopes, Tensor? sinks, float scale, int before, float softcap)"
        " -> (Tensor, Tensor)"
    ),
)
def attention_decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    before: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, H, T] by the Triton kernels; `before` -1: no window."""
    refusal = _refusal(q, k_cache, v_cache, page_table)
    if refusal is not None:
        raise ValueError(
            f"decoding backend 'triton' cannot run this call: {refusal};"
            " backend='reference' computes everything, slowly"
        )
    # imported at the first call: `import kernels` must work where Triton is absent
    from kernels.attention.portable.decode import decode
    from kernels.attention.portable.launch import Features

    features = Features(
        scale,
        before=before,
        after=0,
        softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        sinks=None if sinks is None else sinks.contiguous(),
    )
    return decode(q, k_cache, v_cache, lengths.contiguous(), page_table, features)


@register_fake(attention_decode_op)
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    out = q.new_empty((B, T, H, v_cache.shape[3]))
    return out, q.new_empty((B, H, T), dtype=torch.float32)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "q must be [B, T, H, D], k_cache and v_cache [B, S, H_kv, D] or, paged,"
            f" [n_pages, page_size, H_kv, D], got {_of(q)}, {_of(k)} and {_of(v)}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k_cache and v_cache must agree in all but the head size, got {_of(k)} and {_of(v)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]}, k_cache has {k.shape[3]}")
    for size in (k.shape[3], v.shape[3]):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"head size {size} is not between 1 and {LARGEST_HEAD}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(
            "q, k_cache and v_cache must share a floating dtype,"
            f" got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _check_cache(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, page_table: Tensor | None
) -> None:
    B = q.shape[0]
    if lengths.shape != (B,) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be [{B}] int32, got {_of(lengths)} {lengths.dtype}")
    if page_table is None:
        if k.shape[0] != B:
            raise ValueError(
                f"q has batch {B}, the cache has {k.shape[0]}: pass page_table if it is paged"
            )
    else:
        if page_table.dim() != 2 or page_table.shape[0] != B or page_table.dtype != torch.int32:
            raise ValueError(
                f"page_table must be [{B}, pages_per_sequence] int32,"
                f" got {_of(page_table)} {page_table.dtype}"
            )
        size = k.shape[1]
        if size < SMALLEST_PAGE or size & (size - 1) != 0:
            raise ValueError(
                f"page size {size} is not a power of two from {SMALLEST_PAGE} on"
                f" (the second dimension of k_cache {_of(k)})"
            )
    given = {"k_cache": k, "v_cache": v, "lengths": lengths, "page_table": page_table}
    for name, x in given.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")


def _check_options(
    q: Tensor,
    scale: float | None,
    window: tuple[int, int] | None,
    slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> int:
    """How many keys before its place a query sees, -1 for all."""
    for option, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{option}={value} must be above 0")
    if window is not None and min(window) < UNBOUNDED:
        raise ValueError(f"window={window} must hold counts of keys, or -1 for no limit")
    H = q.shape[2]
    for name, x in (("alibi_slopes", slopes), ("sinks", sinks)):
        if x is not None and (x.shape != (H,) or x.device != q.device):
            raise ValueError(f"{name} must be [{H}] on {q.device}, got {_of(x)} on {x.device}")
    if slopes is not None and slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes must be torch.float32, got {slopes.dtype}")
    if sinks is not None and not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks must be floating point, got {sinks.dtype}")
    return UNBOUNDED if window is None else min(window[0], FARTHEST)


def _refusal(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor | None) -> str | None:
    """Why the kernels cannot compute a call that makes sense; None when they can."""
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        if (major, minor) < tiles.OLDEST:
            return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    elif q.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors, got {q.device.type} (for tests: set TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, got {q.dtype}"
    given = {"q": q, "k_cache": k, "v_cache": v, "page_table": page_table}
    for name, x in given.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"the last dimension of {name} has stride {x.stride(-1)}, not 1"
    return None


def _of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
