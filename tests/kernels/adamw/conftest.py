"""Where these tests run: the kernel in Triton's interpreter on the CPU, `-m gpu` on a GPU."""

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import interpreted


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with interpreted("kernels.adamw.kernel"):
        yield "cpu"
