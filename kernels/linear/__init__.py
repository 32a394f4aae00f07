"""Matrix products of layers with what surrounds them: `linear`, `norm_linear`, `norm_gelu_mlp`,
`norm_swiglu_mlp`; for layers that multiply in another way, `swiglu` alone and, for products in fp8,
`add_float8_product`."""

from kernels.linear.float8 import add_float8_product
from kernels.linear.mlp import norm_gelu_mlp, norm_swiglu_mlp, swiglu
from kernels.linear.op import linear, norm_linear, parameter_gradients

__all__ = [
    "add_float8_product",
    "linear",
    "norm_gelu_mlp",
    "norm_linear",
    "norm_swiglu_mlp",
    "parameter_gradients",
    "swiglu",
]
