"""The portable backend: pointer kernels in plain Triton, for NVIDIA GPUs from sm_80 on.

One source for every card; what differs between cards is tiles.py.
"""

from kernels.attention.portable.backward import backward
from kernels.attention.portable.forward import forward
from kernels.attention.portable.launch import Features

__all__ = ["Features", "backward", "forward"]
