"""Fused attention. Public names: `attention` computes it, `explain` says which backend would."""

from kernels.attention.op import attention
from kernels.attention.select import explain

__all__ = ["attention", "explain"]
