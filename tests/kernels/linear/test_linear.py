"""Linear layers and the GELU MLP, with norm and stream, are as accurate as eager PyTorch, in every
way they compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels.linear import linear, norm_gelu_mlp, norm_linear, norm_swiglu_mlp, products, swiglu
from kernels.linear.products import HOPPER
from tests.accuracy import assert_as_accurate
from tests.kernels.linear.conftest import Place

EPS = 1e-5
Results = tuple[Tensor, ...]


def eager_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None = None
) -> Results:
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return (y if stream is None else stream + y,)


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, None if bias is None else bias.to(x.dtype), EPS)


def eager_norm_linear(x: Tensor, norm: Tensor, norm_bias: Any, *rest: Any) -> Results:
    return *eager_linear(eager_norm(x, norm, norm_bias), *rest), x.clone()


def eager_mlp(
    x: Tensor, norm: Tensor, norm_bias: Any, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any
) -> Results:
    (middle,) = eager_linear(eager_norm(x, norm, norm_bias), up, up_bias)
    return eager_linear(F.gelu(middle, approximate="tanh"), down, down_bias, x)


def eager_swiglu(z: Tensor) -> Results:
    gate, up = z.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def eager_swiglu_mlp(
    x: Tensor, norm: Tensor, norm_bias: Any, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any
) -> Results:
    (z,) = eager_linear(eager_norm(x, norm, norm_bias), up, up_bias)
    return eager_linear(*eager_swiglu(z), down, down_bias, x)


def ours_linear(*given: Any, **options: Any) -> Results:
    return (linear(*given, **options),)


def ours_norm_linear(*given: Any, **options: Any) -> Results:
    return norm_linear(*given, eps=EPS, centers=True, **options)


def ours_mlp(*given: Any, **options: Any) -> Results:
    return (norm_gelu_mlp(*given, eps=EPS, centers=True, **options),)


def ours_swiglu_mlp(*given: Any, **options: Any) -> Results:
    return (norm_swiglu_mlp(*given, eps=EPS, centers=True, **options),)


def given_for(kind: str, place: Place, weights: torch.dtype, bias: bool) -> list[Any]:
    """x [.., K] (and the stream) in the dtype of the place, norm, then each layer's parameters."""
    batch, tokens, K, hidden = (8, 504, 256, 1024) if place.on_gpu else (2, 23, 16, 48)
    out = 320 if place.on_gpu else 24

    def vector(size: int, about: float) -> Tensor | None:
        made = (about + 0.5 * torch.randn(size, device=place.device)).to(weights)
        return made if bias or about else None

    def layer(into: int, out: int) -> list[Any]:
        weight = torch.randn(out, into, device=place.device, dtype=weights) / into**0.5
        return [weight, vector(out, 0)]

    x, stream = (
        torch.randn(batch, tokens, size, device=place.device).to(place.dtype) for size in (K, out)
    )
    norm = [vector(K, 1), vector(K, 0)]
    return {
        "linear": [x, *layer(K, out)],
        "added": [x, *layer(K, out), stream],
        "norm": [x, *norm, *layer(K, out)],
        "mlp": [x, *norm, *layer(K, hidden), *layer(hidden, K)],
        "swiglu": [x, *norm, *layer(K, 2 * hidden), *layer(hidden, K)],
    }[kind]


KINDS: dict[str, tuple[Callable[..., Results], Callable[..., Results]]] = {
    "linear": (ours_linear, eager_linear),
    "added": (ours_linear, eager_linear),
    "norm": (ours_norm_linear, eager_norm_linear),
    "mlp": (ours_mlp, eager_mlp),
    "swiglu": (ours_swiglu_mlp, eager_swiglu_mlp),
}


def run(function: Any, inputs: list[Any], dtype: torch.dtype | None, **options: Any) -> list[Any]:
    """Results and all gradients."""
    inputs = [
        None if x is None else (x if dtype is None else x.to(dtype)).detach().clone()
        for x in inputs
    ]
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    results = function(*inputs, **options)
    torch.manual_seed(1)
    seeds = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in results]
    return [*results, *torch.autograd.grad(results, leaves, seeds)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["fp32", "own"])
@pytest.mark.parametrize("remakes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_eager(
    kind: str, remakes: bool, weights: str, bias: bool, place: Place
) -> None:
    ours, eager = KINDS[kind]
    inputs = given_for(kind, place, torch.float32 if weights == "fp32" else place.dtype, bias)
    mine = run(ours, inputs, None, remakes=remakes, backend=place.backend)
    # weights of products count as they are used, rounded; ours does not round a norm's
    whole = (1, 2) if kind in ("norm", "mlp", "swiglu") else ()
    rounded = [
        x if x is None or number in whole else x.to(place.dtype) for number, x in enumerate(inputs)
    ]
    low, exact = run(eager, inputs, None), run(eager, rounded, torch.float64)
    size = max(float(x.detach().abs().max()) for x in exact)
    for number, (a, b, c) in enumerate(zip(mine, low, exact, strict=True)):
        assert a.dtype == b.dtype
        terms = size if a.dtype == torch.float32 else 0.0
        assert_as_accurate(a.detach(), b.detach(), c.detach(), name=f"result {number}", terms=terms)


@pytest.mark.parametrize("shape", [(3, 50, 96), (3, 50, 154), (64,)])
def test_swiglu_alone_is_as_accurate_as_eager(shape: tuple[int, ...], place: Place) -> None:
    z = (2 * torch.randn(shape, device=place.device)).to(place.dtype)
    mine = run(lambda z: (swiglu(z, backend=place.backend),), [z], None)
    low, exact = run(eager_swiglu, [z], None), run(eager_swiglu, [z], torch.float64)
    for a, b, c in zip(mine, low, exact, strict=True):
        assert_as_accurate(a.detach(), b.detach(), c.detach(), name=f"z {shape}")


def test_sums_over_tokens_do_not_stop_growing(place: Place) -> None:
    """As they would in 16 bits."""
    rows = 70_000 if place.on_gpu else 4000
    x = torch.ones(rows, 8, device=place.device).to(place.dtype)
    bias = torch.zeros(24, device=place.device).requires_grad_()
    y = linear(x, torch.zeros(24, 8, device=place.device), bias, backend=place.backend)
    y.backward(torch.ones_like(y))
    assert bias.grad is not None
    assert bias.grad.tolist() == [rows] * 24


def test_what_is_made_again_is_what_was(place: Place) -> None:
    inputs = given_for("mlp", place, torch.float32, True)
    kept = run(ours_mlp, inputs, None, remakes=False, backend=place.backend)
    made = run(ours_mlp, inputs, None, remakes=True, backend=place.backend)
    # GELUs of libraries need not round as ours does; in fp32 a sum over tokens then rounds in other
    # ways at every step, in 16 bits only where it ends
    steps = 8 if place.dtype == torch.float32 else 1
    rounding = steps * torch.finfo(place.dtype).eps
    for a, b in zip(kept, made, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rounding * float(b.detach().abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER,
    reason="cuBLASLt's epilogues are for Hopper",
)
def test_on_hopper_the_library_has_a_way_for_all() -> None:
    products._plans.clear()
    place = Place("cuda", torch.bfloat16, "auto")
    for bias in (True, False):
        run(ours_mlp, given_for("mlp", place, torch.float32, bias), None)
    assert products._plans and all(plan is not None for plan in products._plans.values())


@pytest.mark.gpu
def test_gradients_do_not_vary() -> None:
    inputs = given_for("mlp", Place("cuda", torch.bfloat16, "auto"), torch.float32, True)
    first = run(ours_mlp, inputs, None)
    for _ in range(10):
        for a, b in zip(run(ours_mlp, inputs, None), first, strict=True):
            assert torch.equal(a, b)


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        given = zip((x, weight, torch.randn(4)), needs, strict=True)
        inputs = [tensor.clone().requires_grad_(need) for tensor, need in given]
        linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == list(needs)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def kept(function: Any, inputs: list[Any], **options: Any) -> int:
    """Numbers that backward needs beside inputs and parameters."""
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    given = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            found[tensor.untyped_storage().data_ptr()] = tensor  # keeps it: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs, **options)
    return sum(tensor.numel() for tensor in found.values())


def test_no_norm_is_kept_and_no_gelu_that_is_made_again(place: Place) -> None:
    if place.backend == "torch":
        pytest.skip("PyTorch keeps what it keeps")
    inputs = given_for("mlp", place, torch.float32, True)
    tokens = inputs[0].shape[0] * inputs[0].shape[1]
    hidden, weights = inputs[3].shape[0], inputs[3].numel() + inputs[5].numel()
    if place.dtype == torch.float32:
        weights = 0  # nothing is cast
    options = {"backend": place.backend}
    assert kept(ours_mlp, inputs, remakes=True, **options) == tokens * (hidden + 2)
    assert kept(ours_mlp, inputs, **options) == tokens * (2 * hidden + 2) + weights
    inputs = given_for("swiglu", place, torch.float32, True)
    double = inputs[3].shape[0]  # gate and up
    assert kept(ours_swiglu_mlp, inputs, remakes=True, **options) == tokens * (double + 2)
    inputs = given_for("norm", place, torch.float32, True)
    assert kept(ours_norm_linear, inputs, remakes=True, **options) == 2 * tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_break(kind: str, device: str) -> None:
    place = Place(device, torch.bfloat16 if device == "cuda" else torch.float32, "auto")
    inputs = given_for(kind, place, torch.float32, True)
    function = KINDS[kind][0]
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(run(compiled, inputs, None), run(function, inputs, None), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gpu_takes_is_traced_without_a_break(kind: str) -> None:
    """The choice of a card's ways, too, which a CPU's tensors never reach."""
    torch._dynamo.reset()
    with FakeTensorMode():
        inputs = given_for(kind, Place("cuda", torch.bfloat16, "auto"), torch.float32, True)
        compiled = torch.compile(KINDS[kind][0], fullgraph=True, backend="eager")
        for made, plain in zip(compiled(*inputs), KINDS[kind][0](*inputs), strict=True):
            assert (made.shape, made.dtype) == (plain.shape, plain.dtype)


def test_library_checks_pass(place: Place) -> None:
    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=place.device, dtype=place.dtype)

    x, weight, bias, dy = made(16, 8), made(24, 8), made(24), made(16, 24)
    check = torch.library.opcheck
    check(products.gelu_product, (x, weight, bias, place.backend))
    for b in (bias, None):
        check(products.add_product, (x, weight, b, dy, place.backend))
    check(products.weight_gradient, (dy, x, torch.float32, place.backend))
    if place.backend == "torch":  # the rest is kernels
        return
    check(products.column_sums, (dy, torch.float32))
    z, other = made(16, 8), torch.bfloat16 if place.dtype == torch.float32 else torch.float32
    for b in (bias, None):
        check(products.cast, (weight, b, other, False))
    for wished in ((True, True), (False, False)):
        check(products.gelu_gradient, (dy, weight, z, *wished))
        check(products.swiglu_gradient, (dy, made(16, 48), *wished))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": (
        {"backend": "cutlass"},
        "backend='cutlass' is not one of auto, cublaslt, triton, torch",
    ),
    "features": ({"weight": torch.zeros(4, 7)}, r"weight \[4, 7\] takes 7 features, and gets 8"),
    "bias": ({"bias": torch.zeros(5)}, r"bias \[5\] must be \[4\]"),
    "stream": (
        {"stream": torch.zeros(3, 8)},
        r"stream is torch.float32 \[3, 8\]: it must be torch.float32 \[3, 4\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=sentence):
        linear(**{**given, **changes})


def test_an_mlp_gives_back_as_many_features() -> None:
    ones = torch.ones(8)
    with pytest.raises(ValueError, match=r"down \[6, 12\] must give back the 8 features of x"):
        norm_gelu_mlp(
            torch.zeros(3, 8), ones, None, torch.zeros(12, 8), None, torch.zeros(6, 12), None,
            eps=EPS, centers=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"gate_up \[12, 8\] must give twice the 12 features"):
        norm_swiglu_mlp(
            torch.zeros(3, 8), ones, None, torch.zeros(12, 8), None, torch.zeros(8, 12), None,
            eps=EPS, centers=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="7 features of z are not two halves"):
        swiglu(torch.zeros(3, 7))
