"""fp8 products that end in the residual stream: by cuBLASLt and by PyTorch, beside float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.fp8_cast import E4M3, E5M2
from kernels.linear import add_float8_product, products, reference
from kernels.linear.products import HOPPER
from tests.accuracy import assert_as_accurate

# of CPU and of GPUs: tokens, input features, output features
SMALL_SIZES = [(16, 32, 48), (5, 16, 16), (1, 32, 16)]
LARGE_SIZES = [(4096, 768, 768), (4096, 3072, 768), (1000, 512, 1040), (77, 1040, 256)]
TYPES = pytest.mark.parametrize("a_type", [E4M3, E5M2], ids=["e4m3", "e5m2"])
BIASES = pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
FAST = pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def given_for(
    sizes: tuple[int, int, int], a_type: torch.dtype, biased: bool, device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Any]:  # fmt: skip
    """a, b, a_scale, b_scale, bias, stream: the product is about as large as the stream."""
    N, K, F = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    scales = [torch.tensor(s, device=device) for s in (0.25, 4 / K**0.5)]
    bias = normal(F).to(dtype) if biased else None
    return [normal(N, K).to(a_type), normal(F, K).to(E4M3), *scales, bias, normal(N, F).to(dtype)]


def exact(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, stream: Tensor
) -> Tensor:
    y = a.double() @ b.double().t() * (a_scale.double() * b_scale.double()) + stream.double()
    return y if bias is None else y + bias.double()


def separate(*given: Any, fast: bool) -> Tensor:
    """What the op stands for: a product that is rounded, then a sum that is."""
    return reference.add_float8_product(*given, fast)


@TYPES
@BIASES
@DTYPES
@pytest.mark.parametrize("sizes", SMALL_SIZES)
def test_it_is_the_sum(
    sizes: tuple[int, int, int], dtype: torch.dtype, biased: bool, a_type: torch.dtype
) -> None:
    given = given_for(sizes, a_type, biased, dtype=dtype)
    y = add_float8_product(*given, fast=True)
    assert y.dtype == dtype
    a, b, a_scale, b_scale, bias, stream = given
    eager = stream + (a.float() @ b.float().t() * (a_scale * b_scale)).to(dtype)
    if bias is not None:
        eager = eager + bias
    assert_as_accurate(y, eager, exact(*given))


def test_a_bias_is_cast() -> None:
    given = given_for((16, 32, 48), E4M3, True)
    expected = add_float8_product(*given, fast=True)
    given[4] = given[4].float()
    assert torch.equal(add_float8_product(*given, fast=True), expected)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("cuBLASLt's epilogues are for Hopper")


@pytest.mark.gpu
@TYPES
@BIASES
@FAST
@DTYPES
@pytest.mark.parametrize("sizes", LARGE_SIZES)
def test_the_library_sums(
    sizes: tuple[int, int, int], dtype: torch.dtype, fast: bool, biased: bool,
    a_type: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needs_hopper()
    monkeypatch.setattr(products, "_plans", {})
    given = given_for(sizes, a_type, biased, "cuda", dtype)
    y = add_float8_product(*given, fast=fast)
    (plan,) = products._plans.values()
    assert plan is not None, "PyTorch computed it"
    eager = separate(*given, fast=fast)
    right = exact(*given)
    assert_as_accurate(y, eager, right)
    # element by element: three roundings apart, and what two orders of summing may be; a card keeps
    # some 13 bits of a partial sum, exactly summed those of 128 terms
    a, b, a_scale, b_scale, _, stream = given
    terms = (a.double().abs() @ b.double().abs().t()) * (a_scale.double() * b_scale.double())
    roundings = torch.finfo(dtype).eps / 2 * (2 * right.abs() + (right - stream.double()).abs())
    limit = 1.01 * roundings + terms / 2 ** (10 if fast else 12)
    assert bool(((y.double() - eager.double()).abs() <= limit).all())


@pytest.mark.gpu
def test_each_call_has_its_scales() -> None:
    """A plan is kept, and addresses are a part of it."""
    needs_hopper()
    given = given_for((512, 256, 256), E4M3, True, "cuda")
    add_float8_product(*given, fast=True)
    given[2:4] = given[2] * -3, given[3] * 0.5
    eager = separate(*given, fast=True)
    assert_as_accurate(add_float8_product(*given, fast=True), eager, exact(*given))


@pytest.mark.gpu
def test_a_graph_reads_scales_when_it_runs() -> None:
    needs_hopper()
    given = given_for((512, 256, 256), E4M3, True, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add_float8_product(*given, fast=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = add_float8_product(*given, fast=True)
    given[2].mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert_as_accurate(y, separate(*given, fast=True), exact(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_any_number_of_tokens(tokens: int, backend: str) -> None:
    given = given_for((tokens, 256, 512), E4M3, True, "cuda")
    y = add_float8_product(*given, True, backend)
    assert_as_accurate(y, separate(*given, fast=True), exact(*given))


@pytest.mark.parametrize("strided", ["a", "b", "bias", "stream"])
def test_the_library_gets_what_lies_together(strided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told addresses and sizes alone; b is its A, so scales change places."""

    class Plan:
        def __init__(self, *about: Any, fast: bool) -> None:
            assert fast

        def run(
            self, a: Tensor, b: Tensor, d: Tensor, *, c: Tensor, bias: Tensor,
            scales: tuple[Tensor, Tensor],
        ) -> None:  # fmt: skip
            assert all(x.is_contiguous() for x in (a, b, c, d, bias))
            assert scales[0] is given[3] and scales[1] is given[2]
            d.copy_(exact(b, a, scales[1], scales[0], bias, c))

    monkeypatch.setattr(products, "_takes_cublaslt", lambda a, backend: True)
    monkeypatch.setattr(products, "_plan", Plan)
    given = given_for((16, 32, 48), E4M3, True)
    expected = exact(*given).bfloat16()
    place = {"a": 0, "b": 1, "bias": 4, "stream": 5}[strided]
    given[place] = torch.stack([given[place].float()] * 2, -1).to(given[place].dtype)[..., 0]
    assert not given[place].is_contiguous()
    assert torch.equal(products.add_float8_product(*given, True, "cublaslt"), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@BIASES
def test_library_checks_pass(biased: bool, device: str) -> None:
    given = given_for((16, 32, 48), E4M3, biased, device)
    backend = "torch" if device == "cpu" else "auto"
    # test_schema compares arguments by a product that fp8 has not: what it looks for is below
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    arguments = (*given, True, backend)
    torch.library.opcheck(products.add_float8_product, arguments, test_utils=checks)
    tensors = [x for x in given if x is not None]
    before = [x.clone() for x in tensors]
    y = products.add_float8_product(*arguments)
    for x, copy in zip(tensors, before, strict=True):
        assert torch.equal(x.view(torch.uint8), copy.view(torch.uint8)) if x.dim() else x == copy
        assert x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_without_a_break(device: str) -> None:
    torch._dynamo.reset()
    given = given_for((16, 32, 48), E4M3, True, device)
    compiled = torch.compile(add_float8_product, fullgraph=True)
    assert torch.equal(compiled(*given, True), add_float8_product(*given, True))


def test_what_a_gpu_takes_is_traced_without_a_break() -> None:
    torch._dynamo.reset()
    with FakeTensorMode():
        given = given_for((16, 32, 48), E4M3, True, "cuda")
        compiled = torch.compile(add_float8_product, fullgraph=True, backend="eager")
        y = compiled(*given, True)
    assert (y.shape, y.dtype, y.device.type) == ((16, 48), torch.bfloat16, "cuda")


def test_flops_are_counted() -> None:
    given = given_for((16, 32, 48), E4M3, True)
    with FlopCounterMode(display=False) as counter:
        add_float8_product(*given, True)
    assert counter.get_total_flops() == 2 * 16 * 32 * 48


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a": (
        {"a": torch.zeros(3, 16)},
        r"a is torch.float32 \[3, 16\]: it must be a matrix in fp8",
    ),
    "features": (
        {"b": torch.zeros(32, 32).to(E4M3)},
        r"b \[32, 32\] takes 32 features, and gets 16",
    ),
    "bias": ({"bias": torch.zeros(5)}, r"bias \[5\] must be \[32\]"),
    "rowwise": (
        {"b_scale": torch.ones(32, 1)},
        r"b_scale is torch.float32 \[32, 1\] on cpu: it must be 0-dim torch.float32 on cpu",
    ),
    "double": ({"a_scale": torch.ones(()).double()}, r"a_scale is torch.float64 \[\] on cpu"),
    "elsewhere": ({"a_scale": torch.ones((), device="meta")}, "on meta: it must be .* on cpu"),
    "stream": ({"stream": torch.zeros(3, 16)}, r"stream \[3, 16\] must be \[3, 32\]"),
    "backend": ({"backend": "cutlass"}, "backend='cutlass' is not one of auto, cublaslt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given: dict[str, Any] = {
        "a": torch.zeros(3, 16).to(E4M3), "b": torch.zeros(32, 16).to(E4M3),
        "a_scale": torch.ones(()), "b_scale": torch.ones(()), "bias": torch.zeros(32),
        "stream": torch.zeros(3, 32), "fast": True,
    }  # fmt: skip
    add_float8_product(**given)
    with pytest.raises(ValueError, match=sentence):
        add_float8_product(**{**given, **changes})


def test_it_has_no_gradient_of_its_own() -> None:
    given = given_for((16, 32, 48), E4M3, False)
    given[-1].requires_grad_()
    with pytest.raises(RuntimeError, match="no formula for its gradient"):
        add_float8_product(*given, True)
