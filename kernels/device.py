"""What Triton kernels ask of the device they run on."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on a CPU, where kernels run in Triton's interpreter."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_HERE: AbstractContextManager[Any] = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE  # torch.cuda.device would ask, and switch to and fro, for 4 us
    return torch.cuda.device(tensor.device)
