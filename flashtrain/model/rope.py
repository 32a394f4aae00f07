"""Frequencies of rotary positions, with their scalings; the rotation itself is kernels/rope.

Keys and formulas are those of Hugging Face's `rope_parameters`, so that its checkpoints mean the
same here. Notation: R rotated dims of a head, theta_i = rope_theta^(-2i/R), i < R/2, L the
`original_max_position_embeddings`.
"""

import math

import torch
from torch import Tensor

from flashtrain.config import PositionConfig, RopeScaling, RopeType


def rope_frequencies(position: PositionConfig, head_size: int) -> tuple[Tensor, float]:
    """Radians per position `[R/2]` fp64 on the CPU, and the factor on cos and sin (YaRN's)."""
    rotated = int(head_size * position.partial_rotary_factor)
    scaling, base = position.scaling, position.rope_theta
    if scaling.rope_type is RopeType.ntk:
        # "NTK-aware": the slowest pair slows by `factor`, the fastest keeps its speed
        base *= scaling.factor ** (rotated / (rotated - 2)) if rotated > 2 else 1.0
    dims = torch.arange(0, rotated, 2, dtype=torch.float64, device="cpu")
    frequencies = base ** (-dims / rotated)
    match scaling.rope_type:
        case RopeType.linear:  # position interpolation: Chen et al. 2023, arXiv:2306.15595
            return frequencies / scaling.factor, 1.0
        case RopeType.llama3:
            return _llama3(frequencies, scaling), 1.0
        case RopeType.yarn:
            return _yarn(frequencies, scaling, base)
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Turns over L: below `low_freq_factor` divide by `factor`, above `high_freq_factor` keep.

    Between the two, blend linearly in the number of turns.
    """
    length = scaling.original_max_position_embeddings
    assert length is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, scaling: RopeScaling, base: float) -> tuple[Tensor, float]:
    """Peng et al. 2023, arXiv:2309.00071: a blend as above, but linear in the dim's number."""
    length, half = scaling.original_max_position_embeddings, len(frequencies)
    assert length is not None

    def dim_of(turns: float) -> float:
        """The (fractional) pair that makes this many turns over L."""
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(base)

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), 2 * half - 1)
    width = high - low or 0.001  # Hugging Face's guard against a ramp of no width
    pairs = torch.arange(half, dtype=torch.float64, device="cpu")
    interpolated = ((pairs - low) / width).clamp(0, 1)
    blend = interpolated * frequencies / scaling.factor + (1 - interpolated) * frequencies
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return blend, magnitude
