"""What a model knows about token order: one module, asked once per forward pass.

`GPT` calls `position(T, device, places)` and hands the answer to the token embedding (learned and
sinusoidal with `applies_to: [embedding]`) or to the attention of every block:

    learned, sinusoidal   [T, D]  vectors; a projection that receives them sees x + p
    rope                  [T, R]  fp32, cos in the first half, sin in the second (R rotated dims)
    alibi                 [H]     fp32, the slope of every head of the whole model
    none                  None

Where sequences are packed documents, `places [B, T]` says how far each token is from the first of
its document, and the first two are [B, T, ..].

Tables are made outside the blocks, on demand: a model is built on the meta device first, and a
compiled block must not make and keep tensors of its own.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import ModelConfig, PositionConfig, PositionKind, Target
from flashtrain.model.rope import rope_frequencies


class LearnedPosition(nn.Module):
    """One vector per position (Gehring et al. 2017, arXiv:1705.03122); one table for all layers."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, d_model, dtype=torch.float32))

    def forward(self, T: int, device: torch.device, places: Tensor | None = None) -> Tensor:
        """Raises ValueError when the sequence is longer than the table."""
        rows = self.weight.shape[0]
        if rows < T:
            raise ValueError(
                f"a sequence of {T} tokens is longer than the {rows} learned positions: raise "
                "data.sequence_length before training, or use position=rope, alibi or sinusoidal"
            )
        return self.weight[:T] if places is None else F.embedding(places, self.weight)


class FixedPosition(nn.Module, ABC):
    """A table nobody trains, computed in fp64 on the CPU, so that all devices hold equal values."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self._table: Tensor | None = None  # no buffer: nothing to save, nothing on meta

    @abstractmethod
    def make(self, T: int) -> Tensor:
        """`[T, ..]` fp32 on the CPU."""

    def forward(self, T: int, device: torch.device, places: Tensor | None = None) -> Tensor:
        table = self._table
        if table is None or table.device != device or table.shape[0] < T:
            # a table first made while sampling under inference_mode must still serve training
            with torch.inference_mode(False):
                table = self._table = self.make(max(T, self.max_length)).to(device)
        return table[:T] if places is None else table[places]


class SinusoidalPosition(FixedPosition):
    """Vaswani et al. 2017, arXiv:1706.03762, section 3.5: sin and cos in turns.

    `scale` 1 beside normed activations (q, k, v). On the embedding the table takes the embedding's
    own standard deviation, where Vaswani et al. multiply the embedding by sqrt(D) instead: waves of
    root mean square 0.7 would drown tokens of 0.02.
    """

    def __init__(self, max_length: int, d_model: int, scale: float) -> None:
        super().__init__(max_length)
        self.d_model, self.scale = d_model, scale

    def make(self, T: int) -> Tensor:
        dims = torch.arange(0, self.d_model, 2, dtype=torch.float64, device="cpu")
        angles = _steps(T)[:, None] * 10000.0 ** (-dims / self.d_model)  # [T, D / 2]
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return (self.scale * waves[:, : self.d_model]).float()


class RotaryPosition(FixedPosition):
    """Su et al. 2021, arXiv:2104.09864: `rotate` turns pairs of dims by position x frequency."""

    def __init__(self, max_length: int, head_size: int, position: PositionConfig) -> None:
        super().__init__(max_length)
        self.head_size, self.config = head_size, position

    def make(self, T: int) -> Tensor:
        frequencies, magnitude = rope_frequencies(self.config, self.head_size)
        angles = _steps(T)[:, None] * frequencies  # [T, R / 2]
        return (magnitude * torch.cat((angles.cos(), angles.sin()), dim=-1)).float()


class AlibiPosition(FixedPosition):
    """Press et al. 2022, arXiv:2108.12409: score - slope x distance, a slope per head."""

    def __init__(self, n_heads: int) -> None:
        super().__init__(n_heads)

    def make(self, T: int) -> Tensor:
        return torch.tensor(alibi_slopes(T), dtype=torch.float32, device="cpu")

    def forward(self, T: int, device: torch.device, places: Tensor | None = None) -> Tensor:
        return super().forward(self.max_length, device)  # rows are heads, whatever T


class NoPosition(nn.Module):
    """Causal attention alone tells order: Haviv et al. 2022, arXiv:2203.16634."""

    def forward(self, T: int, device: torch.device, places: Tensor | None = None) -> None:
        return None


def places_in(documents: Tensor) -> Tensor:
    """[B, T] -> how many tokens of the same run of equal numbers come before each: [B, T] int64."""
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = documents[:, 1:] != documents[:, :-1]
    first = torch.where(F.pad(begins, (1, 0), value=True), place, 0).cummax(1).values
    return place - first


def build_position(model: ModelConfig, position: PositionConfig, max_length: int) -> nn.Module:
    """The module for `position.kind`; `max_length` sizes tables (a limit for learned ones only)."""
    assert model.head_size is not None
    match position.kind:
        case PositionKind.learned:
            return LearnedPosition(max_length, model.d_model)
        case PositionKind.sinusoidal:
            on_embedding = Target.embedding in position.applies_to
            scale = math.sqrt(2) * model.init_std if on_embedding else 1.0
            return SinusoidalPosition(max_length, model.d_model, scale)
        case PositionKind.rope:
            return RotaryPosition(max_length, model.head_size, position)
        case PositionKind.alibi:
            return AlibiPosition(model.n_heads)
        case _:
            return NoPosition()


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for n a power of two.

    Otherwise those of the power of two below, then every second one of the power above, as the
    authors' own code does.
    """
    below = 2 ** (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    finer = [2.0 ** (-4 * (head + 1) / below) for head in range(0, 2 * below, 2)]
    return slopes + finer[: n_heads - below]


def _steps(T: int) -> Tensor:
    return torch.arange(T, dtype=torch.float64, device="cpu")
