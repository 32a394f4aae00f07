"""An op defined by `operation` is one that autograd and torch.compile know all about."""

from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.operation import operation, register_autograd, register_fake

COMPILERS = pytest.mark.parametrize("backend", [None, "aot_eager"])


@operation("flashtrain_test::double")
def double(x: Tensor, times: int = 1) -> Tensor:
    return x * 2**times


@register_fake(double)
def _(x: Tensor, times: int = 1) -> Tensor:
    return x.new_empty(x.shape)


@operation("flashtrain_test::double_", mutates_args=("x",))
def double_(x: Tensor, times: int = 1) -> None:
    x.mul_(2**times)


@register_fake(double_)
def _(x: Tensor, times: int = 1) -> None:
    return None


@operation("flashtrain_test::known", schema="(Tensor x) -> Tensor")
def known(*given: Any) -> Tensor:
    return given[0] * 2


@register_fake(known)
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


register_autograd(known, lambda _, dy: double(dy))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return double(x, times=2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return double(dy, 2) + 0 * double(x)


def maybe_compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, fullgraph=True)
    return function if backend is None else compiled


def test_library_checks_pass() -> None:
    torch.library.opcheck(double, (torch.randn(3),))
    torch.library.opcheck(double_, (torch.randn(3), 2))
    torch.library.opcheck(known, (torch.randn(3, requires_grad=True),))


@COMPILERS
def test_gradients_are_those_of_the_function_around(backend: str | None) -> None:
    x = torch.randn(3, requires_grad=True)
    y = maybe_compiled(lambda x: _Double.apply(x + 1), backend)(x)
    y.sum().backward()
    assert torch.equal(y, 4 * (x + 1)) and x.grad is not None
    assert x.grad.tolist() == [4.0] * 3


@COMPILERS
def test_a_formula_is_used(backend: str | None) -> None:
    x = torch.randn(3, requires_grad=True)
    maybe_compiled(lambda x: known(x + 1), backend)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3


@COMPILERS
@pytest.mark.parametrize("op", [double, double_])
def test_a_gradient_that_would_be_lost_is_refused(op: Any, backend: str | None) -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"{op.name()} has no formula for its gradient"):
        maybe_compiled(lambda x: op(x + 1), backend)(x)
    with torch.no_grad():
        maybe_compiled(lambda x: op(x + 1), backend)(x)
    maybe_compiled(lambda x: op(x.detach() + 1), backend)(x)


def test_a_write_counts() -> None:
    x = torch.randn(3, requires_grad=True)
    kept = x.exp()  # exp keeps its result for backward
    with torch.no_grad():
        double_(kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_write_is_no_secret_to_a_compiler() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        before = y.clone()
        double_(y)
        return before, y

    x = torch.randn(3)
    before, y = maybe_compiled(function, "inductor")(x)
    assert torch.equal(before, x + 1) and torch.equal(y, 2 * (x + 1))
    expected = 2 * x
    maybe_compiled(double_, "inductor")(x)
    assert torch.equal(x, expected)


def test_without_autograd_nothing_counts() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        double_(x)
        assert double(x).tolist() == [4.0] * 3


@pytest.mark.parametrize("op", [double, double_, known])
def test_no_compiler_looks_into_an_op(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it gave up on the caller, and so tries what the caller calls."""
    seen, tried = [], []
    compile_frame = torch._dynamo.convert_frame._compile

    def noting(code: CodeType, *arguments: Any, **options: Any) -> Any:
        tried.append(code.co_name)
        return compile_frame(code, *arguments, **options)

    monkeypatch.setattr(torch._dynamo.convert_frame, "_compile", noting)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(str(graph.code))
        return graph

    def function(x: Tensor) -> Tensor:
        try:
            torch._dynamo.graph_break()
            y = op(x)
            return plain(x if y is None else y)
        finally:
            pass

    def plain(x: Tensor) -> Tensor:
        return x * 7

    torch._dynamo.reset()
    assert torch.compile(function, backend=backend)(torch.ones(3)).tolist() == [14.0] * 3
    assert tried == ["function", "plain"]
    assert len(seen) == 1 and "* 7" in seen[0]


def test_a_name_defined_again_means_the_new_function() -> None:
    """As a notebook does that loads a module again."""
    x, results = torch.ones(3, requires_grad=True), []
    for factor in (2, 3):
        times = operation("flashtrain_test::times", schema="(Tensor x) -> Tensor")(
            lambda x, factor=factor: x * factor
        )
        register_fake(times)(lambda x: x.new_empty(x.shape))
        register_autograd(times, lambda _, dy, factor=factor: dy * factor)
        compiled = torch.compile(times, backend="aot_eager", fullgraph=True)
        for run in (times, compiled):
            y = run(x)
            results += [y[0].item(), torch.autograd.grad(y.sum(), x)[0][0].item()]
    assert results == [2, 2, 2, 2, 3, 3, 3, 3]
