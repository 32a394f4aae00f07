"""Names of compute dtypes in configs -> torch's."""

import torch

from flashtrain.config import Compute

DTYPES = {Compute.bf16: torch.bfloat16, Compute.fp32: torch.float32}
