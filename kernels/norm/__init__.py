"""LayerNorm and RMSNorm with the residual connection around them: `add_norm`."""

from kernels.norm.op import add_norm, norm_gradient

__all__ = ["add_norm", "norm_gradient"]
