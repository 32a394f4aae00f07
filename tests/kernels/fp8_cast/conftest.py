"""Where these tests run: the kernels in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

import torch

from tests.kernels.interpreter import platforms

KERNELS = (
    "kernels.fp8_cast.norm_kernel",  # the first two call the others
    "kernels.fp8_cast.mlp_kernel",
    "kernels.fp8_cast.kernel",
    "kernels.linear.activations",
    "kernels.norm.kernel",
)
platform = platforms(
    *KERNELS, cpu=(torch.float32, torch.bfloat16), cuda=(torch.float32, torch.bfloat16)
)
