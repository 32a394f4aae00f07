"""Fused attention. Public names: `attention` computes it, `explain` says which backend would,
`attention_decode` computes it for the newest tokens of sequences in a key/value cache.
"""

from kernels.attention.decode import attention_decode
from kernels.attention.op import attention
from kernels.attention.select import explain

__all__ = ["attention", "attention_decode", "explain"]
