"""Where the attention tests run, and what they find in fresh memory.

`pytest tests/kernels/attention` runs the Triton kernels on the CPU, in Triton's interpreter;
`-m gpu` runs the same tests on a CUDA GPU at real sizes. The interpreter gets bf16 products
wrong, so the CPU sees float32 and float16 only.

Triton reads TRITON_INTERPRET when a kernel is decorated. Other tests of the same session may
have imported it, and the kernels, without; so the interpreter is a fixture that imports the
kernels afresh and puts everything back.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

KERNELS = "kernels.attention.portable"


@dataclass(frozen=True)
class Platform:
    """One device and dtype to test on."""

    device: str
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", torch.float32), id="cpu-float32"),
        pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """Each device, in the dtype most tests use there."""
    yield from _entered(*request.param)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", torch.float16), id="cpu-float16"),
        pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
    ],
)
def other_platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """The remaining dtypes."""
    yield from _entered(*request.param)


def _entered(device: str, dtype: torch.dtype) -> Iterator[Platform]:
    if device == "cuda":
        yield Platform(device, dtype)
        return
    with interpreted():
        yield Platform(device, dtype)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the portable kernels in Triton's interpreter, whoever imported Triton before."""
    with _language_as_it_was(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret_standard_library(patch)
        before = _take_out_kernels()
        try:
            yield
        finally:
            _take_out_kernels()
            sys.modules.update(before)
            if before:
                importlib.import_module("kernels.attention").portable = before[KERNELS]


@contextmanager
def _language_as_it_was() -> Iterator[None]:
    """What the interpreter replaces in Triton's language, for good wherever a kernel calls another,
    is put back: nothing can be compiled with it. Gluon's language is made of the same classes."""
    import triton.language as tl
    from triton.language import core, math, random, standard
    from triton.runtime.interpreter import InterpretedFunction

    classes = (core.tensor, core.dtype, core.tensor_descriptor_base)
    before = [(place, dict(vars(place))) for place in (tl, core, math, random, standard, *classes)]
    try:
        yield
    finally:
        for place, members in before:
            for name, member in dict(vars(place)).items():
                if name not in members:
                    delattr(place, name)
                elif member is not members[name]:
                    setattr(place, name, members[name])
        InterpretedFunction.rewritten_fn.clear()  # they use names put into those modules


def _interpret_standard_library(patch: pytest.MonkeyPatch) -> None:
    """tl.sum, tl.philox and others are kernels too, decorated when Triton was imported."""
    import triton.language as tl
    from triton.language import core, random, standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, compiled in {**vars(standard), **vars(random)}.items():
        if isinstance(compiled, JITFunction):
            function = InterpretedFunction(compiled.fn)
            for module in (standard, random, tl, core):
                if getattr(module, name, None) is compiled:
                    patch.setattr(module, name, function)


def _take_out_kernels() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.split(".")[:3] == KERNELS.split(".")]
    if names:
        del importlib.import_module("kernels.attention").portable
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory nobody wrote holds NaN, so a lane a kernel forgets shows up in its result."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            with torch.no_grad():  # torch.compile makes some that want gradients
                return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
