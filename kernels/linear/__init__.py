"""Matrix products of layers with what surrounds them: `linear`, `norm_linear`, `norm_gelu_mlp`."""

from kernels.linear.op import linear, norm_gelu_mlp, norm_linear, parameter_gradients

__all__ = ["linear", "norm_gelu_mlp", "norm_linear", "parameter_gradients"]
