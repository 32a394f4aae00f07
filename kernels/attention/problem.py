"""One attention call as plain numbers, for backends to judge, and the checks at the door.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size of q and k, Dv of v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNBOUNDED = -1  # a side of the window without limit
FARTHEST = 2**30  # keys; what reaches farther sees no more, and kernels add it to places in int32
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
    value_size: int  # Dv
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
    bias: bool
    bias_gradient: bool  # somebody wants it; False inside an op, where autograd is not seen
    key_mask: bool
    dropout: float  # 0: none
    return_lse: bool
    deterministic: bool

    @property
    def widest(self) -> int:
        """The larger head size: the one tiles are chosen by."""
        return max(self.head_size, self.value_size)

    @property
    def plain(self) -> bool:
        """No feature beyond causal or full attention."""
        features = (
            self.alibi, self.softcap > 0, self.sinks, self.documents,
            self.bias, self.key_mask, self.dropout > 0,
        )  # fmt: skip
        return not any(features) and self.before == UNBOUNDED and (self.causal or self.after < 0)

    @property
    def has_blind_queries(self) -> bool:
        """The lengths alone leave queries without a key: their out is 0 and their lse is -inf."""
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
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
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
    _check_heads(q, alibi_slopes, sinks)
    if documents is not None:
        _check_documents(q, k, documents)
    if bias is not None:
        _check_bias(q, k, bias)
    if key_mask is not None:
        _check_key_mask(k, key_mask)
    _check_dropout(q, dropout, dropout_seed)
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
        causal=causal,
        before=min(left, FARTHEST),
        after=0 if causal else min(right, FARTHEST),
        alibi=alibi_slopes is not None,
        softcap=softcap or 0.0,
        sinks=sinks is not None,
        documents=documents is not None,
        bias=bias is not None,
        bias_gradient=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        key_mask=key_mask is not None,
        dropout=dropout,
        return_lse=return_lse,
        deterministic=deterministic,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "q, k and v must be [B, T, H, D], [B, S, H_kv, D] and [B, S, H_kv, Dv],"
            f" got {_of(q)}, {_of(k)} and {_of(v)}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must share batch, length and heads, got {_of(k)} and {_of(v)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k and v have {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]}, k has {k.shape[3]}")
    for name, size in (("head size", q.shape[3]), ("value size", v.shape[3])):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"{name} {size} is not between 1 and {LARGEST_HEAD}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")


def _check_heads(q: Tensor, slopes: Tensor | None, sinks: Tensor | None) -> None:
    H = q.shape[2]
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


def _check_documents(q: Tensor, k: Tensor, documents: Tensor) -> None:
    B, T = q.shape[:2]
    if k.shape[1] != T:
        raise ValueError(f"documents need as many queries as keys, got {T} and {k.shape[1]}")
    packed = documents.dim() == 1 and documents.shape[0] >= 2  # cu_seqlens
    # not `in`, which torch.compile gets wrong where some of the numbers are symbols
    known = packed or documents.shape == (B, T) or documents.shape == (B, 2, T)
    if not known or documents.device != q.device:
        raise ValueError(
            f"documents must be ids [{B}, {T}] or cu_seqlens [documents + 1] or bounds"
            f" [{B}, 2, {T}] on {q.device}, got {_of(documents)} on {documents.device}"
        )
    if documents.dim() == 3 and documents.dtype != torch.int32:
        raise ValueError(f"document bounds must be int32, got {documents.dtype}")
    if documents.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"documents must be int32 or int64, got {documents.dtype}")


def _check_bias(q: Tensor, k: Tensor, bias: Tensor) -> None:
    B, T, H, _ = q.shape
    S = k.shape[1]
    # == and not `in`, which fails on the symbolic sizes of torch.compile
    fits = bias.dim() == 4 and all(
        n == 1 or n == most for n, most in zip(bias.shape[:3], (B, H, T), strict=True)
    )
    if not fits or bias.shape[3] != S or bias.device != q.device:
        raise ValueError(
            f"bias must be [{B} or 1, {H} or 1, {T} or 1, {S}] on {q.device},"
            f" got {_of(bias)} on {bias.device}"
        )
    if not bias.dtype.is_floating_point:
        raise ValueError(
            f"bias must be floating point, got {bias.dtype}; a mask of keys goes into key_mask"
        )


def _check_key_mask(k: Tensor, key_mask: Tensor) -> None:
    B, S = k.shape[:2]
    if key_mask.shape != (B, S) or key_mask.device != k.device:
        raise ValueError(
            f"key_mask must be [{B}, {S}] on {k.device}, got {_of(key_mask)} on {key_mask.device}"
        )
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be torch.bool, True where seen, got {key_mask.dtype}")


def _check_dropout(q: Tensor, dropout: float, seed: int | Tensor | None) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    if not isinstance(seed, Tensor):
        return
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device:
        raise ValueError(
            f"dropout_seed must be an int, or one torch.int64 on {q.device},"
            f" got {_of(seed)} {seed.dtype} on {seed.device}"
        )


def _of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
