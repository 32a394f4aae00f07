"""Linear layers and the GELU MLP are as accurate as eager PyTorch, in every way they compute."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear import gelu_mlp, linear
from kernels.linear.op import HOPPER, _plans
from tests.accuracy import assert_as_accurate

PLACES = [
    pytest.param(("cpu", torch.float32, "torch"), id="cpu-float32"),
    pytest.param(("cpu", torch.bfloat16, "torch"), id="cpu-bfloat16"),
    pytest.param(("cuda", torch.float32, "torch"), id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, "torch"), id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, "cublaslt"), id="cublaslt-bf16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16, "cublaslt"), id="cublaslt-fp16", marks=pytest.mark.gpu),
]
Place = tuple[str, torch.dtype, str]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    if found[2] == "cublaslt" and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("cuBLASLt's epilogues are for Hopper")
    return found


def numbers(place: Place, weights: torch.dtype, bias: bool, sizes: tuple[int, ...]) -> list[Any]:
    """x [.., K] in the dtype of the place, then weight and bias of each layer."""
    device, dtype, _ = place
    shape, *features = sizes[:2], *sizes[2:]
    made: list[Any] = [torch.randn(*shape, features[0], device=device, dtype=dtype)]
    for into, out in pairwise(features):
        made.append(torch.randn(out, into, device=device, dtype=weights) / into**0.5)
        made.append(torch.randn(out, device=device, dtype=weights) if bias else None)
    return made


def eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def eager_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    return eager_linear(F.gelu(eager_linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def run(function: Any, inputs: list[Any], dtype: torch.dtype | None, **options: Any) -> list[Any]:
    """Output and all gradients."""
    inputs = [
        None if x is None else (x if dtype is None else x.to(dtype)).detach().clone()
        for x in inputs
    ]
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    y = function(*inputs, **options)
    torch.manual_seed(1)
    seed = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, seed)]


def check(function: Any, eager: Any, inputs: list[Any], **options: Any) -> None:
    ours = run(function, inputs, None, **options)
    # weights that are rounded on use count as they are used
    rounded = [None if x is None else x.to(inputs[0].dtype) for x in inputs]
    low, exact = run(eager, inputs, None), run(eager, rounded, torch.float64)
    size = max(float(x.detach().abs().max()) for x in exact)
    for number, (mine, theirs, right) in enumerate(zip(ours, low, exact, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == right.shape
        terms = size if mine.dtype == torch.float32 else 0.0
        assert_as_accurate(
            mine.detach(), theirs.detach(), right.detach(), name=f"result {number}", terms=terms
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["fp32", "own"])
@pytest.mark.parametrize("sizes", [(2, 24, 32, 16), (1, 5, 8, 24)])
def test_a_layer(sizes: tuple[int, ...], weights: str, bias: bool, place: Place) -> None:
    if place[0] == "cuda":
        sizes = (4 * sizes[0], 32 * sizes[1], 16 * sizes[2], 16 * sizes[3])
    dtype = torch.float32 if weights == "fp32" else place[1]
    check(linear, eager_linear, numbers(place, dtype, bias, sizes), backend=place[2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["fp32", "own"])
@pytest.mark.parametrize("keeps", [True, False])
def test_an_mlp(keeps: bool, weights: str, bias: bool, place: Place) -> None:
    sizes = (8, 512, 256, 1024, 256) if place[0] == "cuda" else (2, 24, 16, 48, 24)
    dtype = torch.float32 if weights == "fp32" else place[1]
    inputs = numbers(place, dtype, bias, sizes)
    check(gelu_mlp, eager_mlp, inputs, keeps=keeps, backend=place[2])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER,
    reason="cuBLASLt's epilogues are for Hopper",
)
def test_on_hopper_the_library_has_a_way_for_all() -> None:
    _plans.clear()
    place = ("cuda", torch.bfloat16, "auto")
    for bias in (True, False):
        run(gelu_mlp, numbers(place, torch.float32, bias, (8, 512, 256, 1024, 256)), None)
    assert _plans and all(plan is not None for plan in _plans.values())


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        given = zip((x, weight, torch.randn(4)), needs, strict=True)
        inputs = [tensor.clone().requires_grad_(need) for tensor, need in given]
        linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == list(needs)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_without_a_break(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = numbers((device, dtype, "auto"), torch.float32, True, (2, 32, 16, 64, 16))

    def both(*given: Any) -> Tensor:
        return gelu_mlp(*given) + linear(given[0], given[1][:16], given[2][:16])

    compiled = torch.compile(both, fullgraph=True)
    for ours, plain in zip(run(compiled, inputs, None), run(both, inputs, None), strict=True):
        size = float(plain.abs().max())
        torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02 * size)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cutlass"}, "backend='cutlass' is not one of auto, cublaslt, torch"),
    "features": ({"weight": torch.zeros(4, 7)}, r"weight \[4, 7\] takes 7 features, and gets 8"),
    "bias": ({"bias": torch.zeros(5)}, r"bias \[5\] must be \[4\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=sentence):
        linear(**{**given, **changes})
