"""The Hopper backend: warp-specialised Gluon kernels for sm_90, forward and backward."""

from kernels.attention.hopper.api import backward, forward, supports, supports_backward

__all__ = ["backward", "forward", "supports", "supports_backward"]
