"""For every test of a kernel: what fresh memory holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory nobody wrote holds NaN, so a lane a kernel forgets shows up in its result."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            with torch.no_grad():  # torch.compile makes some that want gradients
                return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return wrapper

    # torch.device(...) as a context looks once for the functions it changes, and must not find ours
    _device_constructors()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
