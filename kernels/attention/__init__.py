"""Fused attention. Public names: `attention` computes it, `explain` says which backend would,
`attention_decode` computes it for the newest tokens of sequences in a key/value cache,
`attention_packed` takes q, k and v as one tensor and gives their gradient as one,
`document_bounds` prepares packed documents once for many calls, `attention_block_backward` is the
backward pass of one block of keys of many.
"""

from kernels.attention.block import attention_block_backward
from kernels.attention.decode import attention_decode
from kernels.attention.op import attention
from kernels.attention.packed import attention_packed
from kernels.attention.ranges import document_bounds
from kernels.attention.select import explain

__all__ = [
    "attention",
    "attention_block_backward",
    "attention_decode",
    "attention_packed",
    "document_bounds",
    "explain",
]
