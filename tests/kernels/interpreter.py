"""Kernels in Triton's interpreter, so that a CPU runs them; and what runs where.

Triton reads TRITON_INTERPRET when a kernel is decorated. Other tests of the same process may have
imported it, and the kernels, without; so `interpreted` imports the kernels afresh and puts it all
back. The interpreter gets bf16 products wrong, so kernels with products see float32 and float16.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

SHORT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Platform:
    """One device and dtype to test on."""

    device: str
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def platforms(*kernels: str, cpu: tuple[torch.dtype, ...], cuda: tuple[torch.dtype, ...]) -> Any:
    """A fixture that gives each Platform in turn; on the CPU `kernels` are interpreted."""
    places = [(Platform("cpu", dtype), ()) for dtype in cpu]
    places += [(Platform("cuda", dtype), (pytest.mark.gpu,)) for dtype in cuda]
    params = [
        pytest.param(place, id=f"{place.device}-{SHORT[place.dtype]}", marks=marks)
        for place, marks in places
    ]

    @pytest.fixture(scope="module", params=params)
    def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
        found: Platform = request.param
        if found.on_gpu:
            yield found
            return
        with interpreted(*kernels):
            yield found

    return platform


@contextmanager
def interpreted(*kernels: str) -> Iterator[None]:
    """Run these modules, or packages, in the interpreter, whoever imported them before."""
    with _language_as_it_was(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret_standard_library(patch)
        before = _take_out(kernels)
        try:
            yield
        finally:
            _take_out(kernels)
            sys.modules.update(before)
            for name, module in before.items():
                _set(name, module)


def _take_out(kernels: tuple[str, ...]) -> dict[str, ModuleType]:
    """Forget the compiled kernels, so that they are imported, and decorated, afresh."""
    names = [n for n in sys.modules if any(n == k or n.startswith(f"{k}.") for k in kernels)]
    found = {name: sys.modules.pop(name) for name in names}
    for name in names:
        _set(name, None)
    return found


def _set(name: str, module: ModuleType | None) -> None:
    """As the attribute of its package that an import leaves."""
    parent, _, leaf = name.rpartition(".")
    package = sys.modules.get(parent)
    if package is None:
        return
    if module is not None:
        setattr(package, leaf, module)
    elif hasattr(package, leaf):
        delattr(package, leaf)


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
