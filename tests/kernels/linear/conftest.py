"""Where these tests run: plain PyTorch, the passes in Triton's interpreter, or a GPU's backends."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from kernels.linear.products import HOPPER
from tests.kernels.interpreter import interpreted

KERNELS = ("kernels.linear.kernel", "kernels.norm.kernel")  # the first one calls the second


@dataclass(frozen=True)
class Place:
    device: str
    dtype: torch.dtype
    backend: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Place("cpu", torch.float32, "torch"), id="cpu-float32"),
        pytest.param(Place("cpu", torch.bfloat16, "torch"), id="cpu-bfloat16"),
        pytest.param(Place("cpu", torch.float32, "triton"), id="triton-float32"),
        pytest.param(Place("cpu", torch.float16, "triton"), id="triton-float16"),
        *(
            pytest.param(Place("cuda", dtype, backend), id=f"cuda-{backend}-{name}",
                         marks=pytest.mark.gpu)
            for dtype, backend, name in (
                (torch.float32, "torch", "float32"), (torch.float32, "triton", "float32"),
                (torch.bfloat16, "torch", "bf16"), (torch.bfloat16, "triton", "bf16"),
                (torch.bfloat16, "cublaslt", "bf16"), (torch.float16, "cublaslt", "fp16"),
            )
        ),
    ],
)  # fmt: skip
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    found: Place = request.param
    if found.backend == "cublaslt" and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("cuBLASLt's epilogues are for Hopper")
    if found.on_gpu or found.backend == "torch":
        yield found
        return
    with interpreted(*KERNELS):
        yield found
