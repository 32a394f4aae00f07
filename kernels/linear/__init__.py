"""Matrix products of layers with what surrounds them: `linear`, `gelu_mlp`."""

from kernels.linear.op import gelu_mlp, linear, parameter_gradients

__all__ = ["gelu_mlp", "linear", "parameter_gradients"]
