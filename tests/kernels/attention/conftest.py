"""Where the attention tests run: `pytest tests/kernels/attention` runs the portable kernels on the
CPU, in Triton's interpreter; `-m gpu` runs the same tests on a CUDA GPU at real sizes."""

import torch

from tests.kernels.interpreter import platforms

PORTABLE = "kernels.attention.portable"
# the dtype most tests use on each device, and the remaining ones
platform = platforms(PORTABLE, cpu=(torch.float32,), cuda=(torch.bfloat16,))
other_platform = platforms(PORTABLE, cpu=(torch.float16,), cuda=(torch.float16, torch.float32))
