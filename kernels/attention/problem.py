"""One attention call as plain numbers, for backends to judge, and the checks at the door.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNBOUNDED = -1  # a side of the window without limit
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Problem:
    """What a backend may look at to accept or refuse a call: no tensor, so asking is free."""

    batch: int
    queries: int  # T
    keys: int  # S
    heads: int  # H
    kv_heads: int  # H_kv, divides H
    head_size: int  # D
    dtype: torch.dtype
    device: torch.device
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of q, k, v
    causal: bool
    before: int  # query t sees at most this many keys before its own place t + S - T; -1: all
    after: int  # and after it; 0 when causal
    alibi: bool
    softcap: float  # 0: none
    sinks: bool
    documents: bool
    return_lse: bool
    deterministic: bool

    @property
    def plain(self) -> bool:
        """No feature beyond causal or full attention."""
        features = self.alibi or self.softcap > 0 or self.sinks or self.documents
        return not features and self.before == UNBOUNDED and (self.causal or self.after < 0)

    @property
    def has_blind_queries(self) -> bool:
        """Some queries may see no key at all: their out is 0 and their lse is -inf."""
        return self.after != UNBOUNDED and self.queries > self.keys + self.after


def describe(
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
) -> Problem:
    """Check a call of `attention` and turn it into a Problem.

    Raises:
        ValueError: shapes, dtypes, devices or options that mean nothing on any backend.
    """
    _check_tensors(q, k, v)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0; None turns it off")
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else window
    if left < UNBOUNDED or right < UNBOUNDED:
        raise ValueError(f"window={window} must hold counts of keys, or -1 for no limit")
    _check_options(q, k, alibi_slopes, sinks, documents)
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
        causal=causal,
        before=left,
        after=0 if causal else right,
        alibi=alibi_slopes is not None,
        softcap=softcap or 0.0,
        sinks=sinks is not None,
        documents=documents is not None,
        return_lse=return_lse,
        deterministic=deterministic,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q and k must be [B, T, H, D] and [B, S, H_kv, D], got {_of(q)} and {_of(k)}"
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must share a shape, got {_of(k)} and {_of(v)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k and v have {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]}, k and v have {k.shape[3]}")
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"head size {q.shape[3]} is not between 1 and {LARGEST_HEAD}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")


def _check_options(
    q: Tensor, k: Tensor, slopes: Tensor | None, sinks: Tensor | None, documents: Tensor | None
) -> None:
    B, T, H, _ = q.shape
    for name, tensor in (("alibi_slopes", slopes), ("sinks", sinks)):
        if tensor is not None and (tensor.shape != (H,) or tensor.device != q.device):
            raise ValueError(
                f"{name} must be [{H}] on {q.device}, got {_of(tensor)} on {tensor.device}"
            )
    if slopes is not None and slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes must be torch.float32, got {slopes.dtype}")
    if slopes is not None and slopes.requires_grad:
        raise ValueError("alibi_slopes get no gradient: pass alibi_slopes.detach()")
    if sinks is not None and not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks must be floating point, got {sinks.dtype}")
    if documents is None:
        return
    if k.shape[1] != T:
        raise ValueError(f"documents need as many queries as keys, got {T} and {k.shape[1]}")
    if documents.shape != (B, T) or documents.device != q.device:
        raise ValueError(
            f"documents must be [{B}, {T}] on {q.device},"
            f" got {_of(documents)} on {documents.device}"
        )
    if documents.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"documents must be int32 or int64, got {documents.dtype}")


def _of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
