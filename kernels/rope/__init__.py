"""Rotary positions: `rotate` in plain PyTorch, which torch.compile can fuse with what is around;
`rotate_heads_` and `rotate_heads` turn the first heads of a tensor in one pass, without gradients.
"""

from kernels.rope.op import check_table, rotate_heads, rotate_heads_
from kernels.rope.reference import rotate

__all__ = ["check_table", "rotate", "rotate_heads", "rotate_heads_"]
