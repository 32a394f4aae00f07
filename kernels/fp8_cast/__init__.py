"""Matrices to fp8 with their scales, as they lie and transposed in one pass."""

from kernels.fp8_cast.mlp import (
    cast_hidden,
    cast_hidden_gradient,
    gradient_bound,
    hidden_bound,
    hidden_maxima,
    longest_row,
)
from kernels.fp8_cast.norm import cast_norm
from kernels.fp8_cast.op import (
    E4M3,
    E5M2,
    Scaled,
    absolute_maximum,
    cast_columnwise,
    cast_gradient,
    cast_rowwise,
    cast_tensorwise,
)

__all__ = [
    "E4M3",
    "E5M2",
    "Scaled",
    "absolute_maximum",
    "cast_columnwise",
    "cast_gradient",
    "cast_hidden",
    "cast_hidden_gradient",
    "cast_norm",
    "cast_rowwise",
    "cast_tensorwise",
    "gradient_bound",
    "hidden_bound",
    "hidden_maxima",
    "longest_row",
]
