"""LayerNorm and RMSNorm with the residual connection around them: `add_norm`."""

from kernels.norm.op import add_norm

__all__ = ["add_norm"]
