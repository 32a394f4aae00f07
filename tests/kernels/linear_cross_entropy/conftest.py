"""Where these tests run: the kernels in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

import torch

from tests.kernels.interpreter import platforms

platform = platforms(
    "kernels.linear_cross_entropy.rows_triton",
    cpu=(torch.float32, torch.float16),
    cuda=(torch.bfloat16, torch.float16, torch.float32),
)
