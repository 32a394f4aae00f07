"""Where these tests run: the kernels in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.attention.conftest import Platform, interpreted, poisoned_memory

__all__ = ["Platform", "platform", "poisoned_memory"]

PACKAGE, KERNELS = "kernels.embedding", "kernel"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", torch.float32), id="cpu-float32"),
        pytest.param(("cpu", torch.float16), id="cpu-float16"),
        pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
    ],
)
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    device, dtype = request.param
    if device == "cuda":
        yield Platform(device, dtype)
        return
    with interpreted():
        before = _take_out()
        try:
            yield Platform(device, dtype)
        finally:
            _take_out()
            if before is not None:
                sys.modules[f"{PACKAGE}.{KERNELS}"] = before
                setattr(importlib.import_module(PACKAGE), KERNELS, before)


def _take_out() -> object | None:
    """Forget the compiled kernels, so that they are imported, and decorated, afresh."""
    module = sys.modules.pop(f"{PACKAGE}.{KERNELS}", None)
    if module is not None:
        delattr(importlib.import_module(PACKAGE), KERNELS)
    return module
