"""Where these tests run: the kernels in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

import torch

from tests.kernels.interpreter import platforms

platform = platforms(
    "kernels.fp8_cast.kernel",
    cpu=(torch.float32, torch.bfloat16),
    cuda=(torch.float32, torch.bfloat16),
)
