"""Norm and residual stream are as accurate as eager PyTorch, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.norm import add_norm, norm_gradient, op
from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import Platform

EPS = 1e-5
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
KINDS = pytest.mark.parametrize("kind", ["layernorm", "layernorm without bias", "rmsnorm"])
# shape, and which of the results goes on
USES = [((1, 6), "both"), ((2, 3, 130), "norm"), ((2, 3, 130), "stream"), ((9, 256), "both")]


def eager(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    s = x if branch is None else x + branch
    weight = weight.to(x.dtype)
    if kind == "rmsnorm":
        return F.rms_norm(s, weight.shape, weight, EPS), s
    return F.layer_norm(s, weight.shape, weight, None if bias is None else bias.to(x.dtype), EPS), s


def ours(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, **options: Any
) -> tuple[Tensor, Tensor]:
    return add_norm(x, branch, weight, bias, eps=EPS, centers=kind != "rmsnorm", **options)


def inputs(
    shape: tuple[int, ...], kind: str, branch: bool, weights: torch.dtype, platform: Platform
) -> list[Tensor | None]:
    made = [2 * torch.randn(shape) + 0.5, torch.randn(shape) if branch else None]
    made = [None if t is None else t.to(platform.device, platform.dtype) for t in made]
    parameters = [1 + torch.randn(shape[-1:]), torch.randn(shape[-1:])]
    made += [p.to(platform.device, weights) for p in parameters]
    return [*made[:3], made[3] if kind == "layernorm" else None]


def run(
    function: Any, given: list[Tensor | None], uses: str, dtype: torch.dtype | None, *rest: Any,
    **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Both results and all gradients; uses: which of the results goes on."""
    given = [
        None if t is None else (t if dtype is None else t.to(dtype)).detach().clone() for t in given
    ]
    leaves = [t.requires_grad_() for t in given if t is not None]
    results = function(*given, *rest, **options)
    torch.manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=results[0].device)
    for name, result in zip(("norm", "stream"), results, strict=True):
        factor = torch.randn(result.shape, device=result.device).to(result.dtype)
        if name in uses or uses == "both":
            total = total + (result * factor).sum(dtype=torch.float64)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        *results,
        *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)),
    ]


@BACKENDS
@KINDS
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("shape", "uses"), USES)
def test_as_accurate_as_eager(
    shape: tuple[int, ...], uses: str, branch: bool, kind: str, backend: str, platform: Platform
) -> None:
    if platform.on_gpu:
        shape = (*(8 * n for n in shape[:-1]), 3 * shape[-1])
    for weights in {torch.float32, platform.dtype}:
        given = inputs(shape, kind, branch, weights, platform)
        mine = run(ours, given, uses, None, kind, backend=backend)
        rounded = [None if t is None else t.to(platform.dtype) for t in given]
        low = run(eager, given, uses, None, kind)
        exact = run(eager, rounded, uses, torch.float64, kind)
        size = max(float(t.detach().abs().max()) for t in exact)
        for number, (a, b, c) in enumerate(zip(mine, low, exact, strict=True)):
            assert a.dtype == b.dtype
            terms = size if a.dtype == torch.float32 else 0.0
            assert_as_accurate(
                a.detach(), b.detach(), c.detach(), name=f"result {number}", terms=terms
            )


@KINDS
def test_backward_writes_the_norm_again(kind: str, platform: Platform) -> None:
    """The very numbers that forward gave."""
    for rows in (5, 64):
        x, _, weight, bias = inputs((rows, 130), kind, False, torch.float32, platform)
        assert x is not None and weight is not None
        centers = kind != "rmsnorm"
        y, _, mean, rstd = op.forward(x, None, weight, bias, EPS, centers)
        _, _, again = op.backward(x, None, x, weight, bias, mean, rstd, centers, True, False)
        assert torch.equal(again, y)


@KINDS
def test_sums_of_what_comes_along_the_stream(kind: str, platform: Platform) -> None:
    x, _, weight, bias = inputs((301, 40), kind, False, torch.float32, platform)
    assert x is not None and weight is not None
    centers = kind != "rmsnorm"
    dy, ds = torch.randn_like(x), torch.randn_like(x)
    _, _, mean, rstd = op.forward(x, None, weight, bias, EPS, centers)
    given = (dy, ds, x, weight, bias, mean, rstd, centers, False)
    dx, total, _ = op.backward(*given, True)
    plain, others, _ = op.backward(*given, False)
    assert torch.equal(dx, plain)
    # fp32 sums of 301 rows up to 60 in size, in another order where the tiles differ
    torch.testing.assert_close(total[:-1], others, rtol=0, atol=1e-4)
    torch.testing.assert_close(total[-1], ds.float().sum(0), rtol=0, atol=1e-4)


def test_gradients_of_parameters_are_summed_in_fp32(platform: Platform) -> None:
    """Over so many rows that a sum in 16 bits would stop growing."""
    rows = 40_000 if platform.on_gpu else 4000
    x = torch.randn(rows, 8, device=platform.device).to(platform.dtype)
    weight, bias = (torch.ones(8, device=platform.device).requires_grad_() for _ in "wb")
    y, _ = ours(x, None, weight, bias, "layernorm", backend="triton")
    y.backward(torch.ones_like(y))
    assert bias.grad is not None
    assert bias.grad.tolist() == [rows] * 8


def test_any_strides_will_do(platform: Platform) -> None:
    x, branch, weight, _ = inputs((6, 16), "rmsnorm", True, torch.float32, platform)
    assert x is not None and branch is not None
    turned = [t.t().contiguous().t() for t in (x, branch)]
    plain = run(ours, [x, branch, weight, None], "both", None, "rmsnorm", backend="triton")
    other = run(ours, [*turned, weight, None], "both", None, "rmsnorm", backend="triton")
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)
    apart = torch.stack([weight, torch.full_like(weight, 9)], -1)[:, 0]  # of every other number
    y, _ = ours(x, branch, apart, apart, "layernorm", backend="triton")
    assert torch.equal(y, ours(x, branch, weight, weight, "layernorm", backend="triton")[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("branch", [True, False])
def test_compiled_without_a_break(device: str, branch: bool) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = inputs((4, 64), "layernorm", branch, torch.float32, Platform(device, dtype))
    compiled = torch.compile(lambda *t: ours(*t, "layernorm"), fullgraph=True)
    plain = run(lambda *t: ours(*t, "layernorm"), given, "both", None)
    # a stream that is x itself leaves what is compiled, and its gradient is added outside: rounded
    # twice
    for a, b in zip(run(compiled, given, "both", None), plain, strict=True):
        rounding = torch.finfo(dtype).eps * float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=rounding)


@pytest.mark.gpu
def test_gradients_do_not_vary() -> None:
    given = inputs((5000, 768), "layernorm", True, torch.float32, Platform("cuda", torch.bfloat16))
    first = run(ours, given, "both", None, "layernorm")
    for _ in range(10):
        for a, b in zip(run(ours, given, "both", None, "layernorm"), first, strict=True):
            assert torch.equal(a, b)


def test_library_checks_pass(platform: Platform) -> None:
    for kind in ("layernorm", "rmsnorm"):
        x, branch, weight, bias = inputs((3, 8), kind, True, torch.float32, platform)
        assert x is not None
        centers = bias is not None
        torch.library.opcheck(op.forward, (x, branch, weight, bias, EPS, centers))
        torch.library.opcheck(op.forward, (x, None, weight, None, EPS, centers))
        _, stream, mean, rstd = op.forward(x, branch, weight, bias, EPS, centers)
        given = (x, branch, stream, weight, bias, mean, rstd, centers)
        torch.library.opcheck(op.backward, (*given, False, False))
        torch.library.opcheck(op.backward, (*given, True, True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of"),
    "branch": ({"branch": torch.zeros(2, 7)}, r"branch is torch.float32 \[2, 7\] and x"),
    "weight": ({"weight": torch.zeros(7)}, r"weight \[7\] must be \[8\]"),
    "bias": ({"centers": False}, "bias torch.float32 is for centers=True"),
    "dtype": (
        {"x": torch.zeros(2, 8).double(), "backend": "triton"},
        "takes rows of up to 16384 numbers in fp32, bf16 or fp16, not torch.float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {
        "x": torch.zeros(2, 8),
        "branch": None,
        "weight": torch.zeros(8),
        "bias": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=sentence):
        add_norm(**{**given, "eps": EPS, "centers": True, **changes})


@BACKENDS
@KINDS
@pytest.mark.parametrize("along", [True, False])
def test_the_gradient_of_a_norm_computed_elsewhere(
    along: bool, kind: str, backend: str, platform: Platform
) -> None:
    """As accurate as eager's, by the statistics alone."""
    x, _, weight, bias = inputs((37, 40), kind, False, torch.float32, platform)
    assert x is not None and weight is not None
    centers = kind != "rmsnorm"
    dy, ds = torch.randn_like(x), torch.randn_like(x) if along else None
    *_, mean, rstd = op.forward(x, None, weight, bias, EPS, centers)
    made = norm_gradient(dy, ds, x, weight, bias, mean, rstd, centers, backend)

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)
        ]
        y, stream = eager(leaves[0], None, leaves[1], leaves[2], kind)  # type: ignore[arg-type]
        total = (y * dy.to(dtype)).sum(dtype=torch.float64)
        if ds is not None:
            total = total + (stream * ds.to(dtype)).sum(dtype=torch.float64)
        return torch.autograd.grad(total, [t for t in leaves if t is not None])

    low, exact = by_autograd(platform.dtype), by_autograd(torch.float64)
    assert (made[2] is None) == (bias is None)
    for number, (a, b, c) in enumerate(zip(made, low, exact, strict=False)):
        assert a is not None and a.dtype == (x.dtype if number == 0 else weight.dtype)
        terms = float(c.abs().max()) if a.dtype == torch.float32 else 0.0
        assert_as_accurate(a, b.to(a.dtype), c, name=f"gradient {number}", terms=terms)
