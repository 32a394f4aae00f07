"""Started again, a kernel gets what Triton itself would give it; no GPU has to be there."""

# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201 -- arguments of kernels have no Python type

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import launch
from kernels.device import on_device
from kernels.launch import run

Launches = list[tuple[Any, ...]]


@triton.jit
def some_kernel(x_ptr, y_ptr, n, flag, factor, ON: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    if ON:
        x += flag
    if y_ptr is not None:
        tl.store(y_ptr + at, (x * factor).to(y_ptr.dtype.element_ty), mask=at < n)


class Driver:
    """A GPU of compute capability 9.0 whose launches are only noted: grid, binary, arguments."""

    def __init__(self) -> None:
        self.launches: Launches = []
        self.device = 0
        self.binaries = itertools.count()
        self.utils = self

    def launcher_cls(self, *_: Any) -> Any:
        def note(*arguments: Any) -> None:
            x, y, z, stream, function, _, _, _, _, *given = arguments
            told = (g.data_ptr() if isinstance(g, Tensor) else (type(g), g) for g in given)
            self.launches.append((x, y, z, stream, function, *told))

        return note

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, next(self.binaries), 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(launch, "_known", {})
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    yield made
    some_kernel.device_caches.clear()


def aligned(n: int, dtype: torch.dtype = torch.float32, off: int = 0) -> Tensor:
    """off: numbers past an address that 16 divides."""
    room = torch.zeros(n + 64, dtype=dtype)
    start = -room.data_ptr() // room.itemsize % (16 // room.itemsize) + off
    return room[start : start + n]


def given(number: int) -> tuple[list[Any], dict[str, Any]]:
    """Arguments between which Triton sees a difference, or might."""
    x, y = aligned(64), aligned(64)
    plain: list[Any] = [x, y, 48, 3, 0.5]
    changes: list[dict[int, Any]] = [
        {}, {1: None}, {1: aligned(64, torch.bfloat16)}, {0: aligned(64, off=1)},
        {1: aligned(64, off=2)}, {2: 1}, {2: 47}, {2: 2**31}, {2: 2**40}, {2: 0}, {3: True},
        {3: 1}, {3: False}, {3: 0}, {3: 1.0}, {4: 1.0}, {4: 2.5}, {4: 2},
        {0: torch.nn.Parameter(aligned(64))},
    ]  # fmt: skip
    for place, value in changes[number].items():
        plain[place] = value
    return plain, dict(ON=True, BLOCK=32, num_warps=4)


OPTIONS = [{}, {"ON": False}, {"ON": 1}, {"BLOCK": 64}, {"num_warps": 2}]
CASES = [*((n, 0) for n in range(19)), *((0, n) for n in range(1, len(OPTIONS)))]


def test_the_kernel_and_its_arguments_are_those_of_triton(gpu: Driver) -> None:
    """Whatever was started before."""
    for n, option in [*CASES, *CASES[::-1], *CASES]:
        arguments, constants = given(n)
        constants |= OPTIONS[option]
        some_kernel[(3, 2)](*arguments, **constants)
        run(some_kernel, (3, 2), *arguments, **constants)
        theirs, ours = gpu.launches
        assert ours == theirs, (n, option)
        gpu.launches.clear()
    # not the two whose addresses are odd; a factor's value is no matter, nor is a Parameter
    assert len(launch._known) == len(CASES) - 2 - 3


def test_what_is_known_goes_past_triton(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, constants = given(0)
    run(some_kernel, (3,), *arguments, **constants)
    monkeypatch.setattr(type(some_kernel), "run", None)
    others, _ = given(0)
    others[4] = 0.25
    run(some_kernel, (7,), *others, **constants)
    first, second = gpu.launches
    assert second[:3] == (7, 1, 1) and second[3:5] == first[3:5]
    assert second[5:7] == (others[0].data_ptr(), others[1].data_ptr())


def test_another_kernel_has_its_own(gpu: Driver) -> None:
    other = triton.jit(some_kernel.fn)
    arguments, constants = given(0)
    for kernel in (some_kernel, other, some_kernel, other):
        run(kernel, (3,), *arguments, **constants)
    functions = [launch[4] for launch in gpu.launches]
    assert functions[:2] == functions[2:] and functions[0] != functions[1]


def test_sequences_of_many_lengths_do_not_fill_the_memory(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MOST", 4)
    for n in range(3, 15):
        arguments, constants = given(0)
        arguments[2] = n
        run(some_kernel, (3,), *arguments, **constants)
        assert len(launch._known) <= 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_each_gpu_has_its_own() -> None:
    """Whichever is the current one."""
    for current, index in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        with torch.cuda.device(current):
            x = torch.randn(64, device=f"cuda:{index}")
            y = torch.zeros_like(x)
            with on_device(x):
                run(some_kernel, (2,), x, y, 64, 3, 0.5, ON=True, BLOCK=32, num_warps=4)
            assert torch.equal(y, (x + 3) * 0.5)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_again() -> None:
    """Other addresses, odd ones among them, in eager code and in a recorded graph."""
    stream = torch.cuda.Stream()
    dtypes = (torch.float32, torch.bfloat16)
    for n, off, dtype, on in itertools.product((47, 48, 1), (0, 1), dtypes, (True, False)):
        for factor in (0.5, 2.0):
            x = torch.randn(64 + off, device="cuda")[off:]
            y = torch.zeros(64, device="cuda", dtype=dtype)
            expected = y.clone()
            expected[:n] = ((x + 3 * on) * factor)[:n].to(dtype)
            constants = dict(ON=on, BLOCK=32, num_warps=4)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(some_kernel, (2,), x, y, n, 3, factor, **constants)
            stream.synchronize()
            assert torch.equal(y, expected)
            y.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(some_kernel, (2,), x, y, n, 3, factor, **constants)
            assert not y.any()
            graph.replay()
            assert torch.equal(y, expected)
