"""What every launch needs: the device, the padded head size, the switches of the call."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.dropout import threshold
from kernels.attention.portable.extras import KEY_BIAS, NO_BIAS, PAIR_BIAS
from kernels.attention.portable.score import (
    DISTANCE,
    FAST_TANH,
    FULL_TANH,
    LOG2_E,
    NO_ALIBI,
    NO_SOFTCAP,
    RAMP,
)
from kernels.attention.tiles import Tile, Tiles, choose

ALIGNMENT = 16  # bytes: the copy engine's rule for addresses and strides


@dataclass(frozen=True)
class Features:
    """The call's options as the kernels take them."""

    scale: float
    before: int = -1  # -1: no limit
    after: int = -1  # 0 when causal
    softcap: float = 0.0  # 0: none
    alibi_slopes: Tensor | None = None  # [H] fp32
    sinks: Tensor | None = None  # [H]
    bounds: Tensor | None = None  # [B, 2, T] int32: where each token's document starts and ends
    bias: Tensor | None = None  # [B or 1, H or 1, T or 1, S]
    key_mask: Tensor | None = None  # [B, S] bool
    key_range: Tensor | None = None  # [B, 2] int32: first and last key that may be seen
    dropout: float = 0.0
    dropout_seed: Tensor | None = None  # [1] int64

    def switches(self, q: Tensor, v: Tensor) -> dict[str, Any]:
        """The compile-time arguments all kernels share."""
        head_size, value_size = q.shape[3], v.shape[3]
        alibi = NO_ALIBI
        if self.alibi_slopes is not None:
            # RAMP splits a small bias into two larger numbers, which costs float32 its last bits
            ramp = self.after == 0 and q.dtype != torch.float32
            alibi = RAMP if ramp else DISTANCE
        softcap = NO_SOFTCAP
        if self.softcap > 0:
            softcap = FULL_TANH if q.dtype == torch.float32 else FAST_TANH
        return {
            "D": head_size,
            "BD": padded(head_size),
            "DV": value_size,
            "BDV": padded(value_size),
            "ALIBI": alibi.value,
            "SOFTCAP": softcap.value,
            "DOCUMENTS": self.bounds is not None,
            "BEFORE": self.before >= 0,
            "AFTER": self.after >= 0,
            "BIAS": self._bias_layout.value,
            "KEY_MASK": self.key_mask is not None,
            "DROPOUT": self.dropout > 0,
        }

    @property
    def _bias_layout(self) -> Any:
        if self.bias is None:
            return NO_BIAS
        return PAIR_BIAS if self.bias.shape[2] > 1 else KEY_BIAS

    def extras(self) -> list[Any]:
        """The arguments of bias, key mask and dropout, the same for all kernels."""
        bias, steps = self.bias, [0, 0, 0]
        if bias is not None:
            bias = bias if bias.stride(3) == 1 else bias.contiguous()
            sizes, strides = bias.shape[:3], bias.stride()[:3]
            steps = [n if size > 1 else 0 for n, size in zip(strides, sizes, strict=True)]
        key_mask = None if self.key_mask is None else self.key_mask.contiguous().view(torch.uint8)
        keep_from = threshold(self.dropout) - 2**31
        keep_scale = 1 / (1 - self.dropout)
        return [bias, *steps, key_mask, self.key_range, self.dropout_seed, keep_from, keep_scale]

    def tiles(self, q: Tensor, v: Tensor) -> Tiles:
        """The tiles of this call."""
        widest = max(q.shape[3], v.shape[3])
        crowded = self.bias is not None or self.dropout > 0
        return choose(q.device, widest, q.dtype, causal=self.causal, crowded=crowded)

    @property
    def causal(self) -> bool:
        """Half of the scores, or about: what the choice of tiles asks."""
        return self.after == 0

    @property
    def score_scale(self) -> float:
        """What q k^T is multiplied by: to log2 units, or to tanh's argument."""
        return self.scale / self.softcap if self.softcap > 0 else self.scale * LOG2_E.value

    @property
    def cap(self) -> float:
        """The soft cap in log2 units."""
        return self.softcap * LOG2_E.value

    def has_edge(self, length: int, rows: int) -> bool:
        """Whether the last tile of `rows` a loop visits in [0, length) may need a mask."""
        return self.after >= 0 or self._ragged or length % rows != 0

    def has_far_edge(self, length: int, rows: int) -> bool:
        """The same, seen from the keys: there the diagonal comes first and the window last."""
        return self.before >= 0 or self._ragged or length % rows != 0

    @property
    def _ragged(self) -> bool:
        """What is seen ends where the data says."""
        return self.bounds is not None or self.key_mask is not None


def padded(head_size: int) -> int:
    """tl.dot wants a power of two of at least 16."""
    return max(16, triton.next_power_of_2(head_size))


def options(tile: Tile) -> dict[str, int]:
    """The launch options of a tile."""
    return {
        "BM": tile.queries,
        "BN": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def sources(tensors: tuple[Tensor, ...], tile: Tile, rows: int) -> tuple[tuple[Any, ...], bool]:
    """What the kernel's tiles of `rows` walk over, and whether that is by TMA.

    Descriptors where the tile asks for them and all tensors are laid out as the hardware wants
    (16-byte aligned, strides too); otherwise the tensors. Both ways compute the same numbers.
    """
    if not tile.tma or not all(_takes_tma(x) for x in tensors):
        return tensors, False
    made = [
        TensorDescriptor(x, list(x.shape), [*_steps(x), 1], [1, rows, 1, padded(x.shape[3])])
        for x in tensors
    ]
    return tuple(made), True


def _takes_tma(x: Tensor) -> bool:
    steps = [x.data_ptr()] + [n * x.element_size() for n in _steps(x)]
    return x.numel() > 0 and all(n > 0 and n % ALIGNMENT == 0 for n in steps)


def _steps(x: Tensor) -> list[int]:
    """Strides but the last; PyTorch leaves that of a dimension of size 1 to chance."""
    return [n if size > 1 else ALIGNMENT for n, size in zip(x.stride()[:3], x.shape, strict=False)]


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
