"""Where these tests run: the kernel in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

import importlib
import sys
from collections.abc import Iterator

import pytest

from tests.kernels.attention.conftest import interpreted

PACKAGE, KERNEL = "kernels.adamw", "kernel"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with interpreted():
        before = _take_out()
        try:
            yield "cpu"
        finally:
            _take_out()
            if before is not None:
                sys.modules[f"{PACKAGE}.{KERNEL}"] = before
                setattr(importlib.import_module(PACKAGE), KERNEL, before)


def _take_out() -> object | None:
    """Forget the compiled kernel, so that it is imported, and decorated, afresh."""
    module = sys.modules.pop(f"{PACKAGE}.{KERNEL}", None)
    if module is not None:
        delattr(importlib.import_module(PACKAGE), KERNEL)
    return module
