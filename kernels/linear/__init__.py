"""Matrix products of layers with what surrounds them: `linear`, `norm_linear`, `norm_gelu_mlp`,
`norm_swiglu_mlp`; `swiglu` alone, for layers that multiply in another way."""

from kernels.linear.mlp import norm_gelu_mlp, norm_swiglu_mlp, swiglu
from kernels.linear.op import linear, norm_linear, parameter_gradients

__all__ = [
    "linear",
    "norm_gelu_mlp",
    "norm_linear",
    "norm_swiglu_mlp",
    "parameter_gradients",
    "swiglu",
]
