"""What every launch needs: the device, the padded head size, the switches of the call."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.portable.score import DISTANCE, LOG2_E, NO_ALIBI, RAMP
from kernels.attention.tiles import Tile

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

    def switches(self, q: Tensor) -> dict[str, Any]:
        """The compile-time arguments all kernels share."""
        head_size = q.shape[3]
        alibi = NO_ALIBI
        if self.alibi_slopes is not None:
            # RAMP splits a small bias into two larger numbers, which costs float32 its last bits
            ramp = self.after == 0 and q.dtype != torch.float32
            alibi = RAMP if ramp else DISTANCE
        return {
            "D": head_size,
            "BD": padded(head_size),
            "ALIBI": alibi.value,
            "SOFTCAP": self.softcap > 0,
            "DOCUMENTS": self.bounds is not None,
            "BEFORE": self.before >= 0,
            "AFTER": self.after >= 0,
        }

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
        return self.after >= 0 or self.bounds is not None or length % rows != 0

    def has_far_edge(self, length: int, rows: int) -> bool:
        """The same, seen from the keys: there the diagonal comes first and the window last."""
        return self.before >= 0 or self.bounds is not None or length % rows != 0


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
    block = [1, rows, 1, padded(tensors[0].shape[3])]
    made = [TensorDescriptor(x, list(x.shape), [*_steps(x), 1], block) for x in tensors]
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
