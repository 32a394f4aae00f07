"""scaled_dot_product_attention on flashtrain's kernels: that they run, and that they are right."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.integrations import sdpa
from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import interpreted

CASES = {
    "causal": dict(T=130, S=130, D=64, options=dict(is_causal=True)),
    "full, more keys": dict(T=70, S=190, D=128, options={}),
    "grouped": dict(T=130, S=130, D=64, H_kv=2, options=dict(is_causal=True, enable_gqa=True)),
    "head size 80 and a scale": dict(T=96, S=96, D=80, options=dict(scale=0.2)),
}


@pytest.fixture
def active() -> Iterator[None]:
    sdpa.activate()
    yield
    sdpa.restore()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time one of our ops is called."""
    made: list[str] = []
    for name in ("attention_forward", "attention_backward"):
        op = getattr(sdpa, name)

        def counted(*arguments: Any, name: str = name, op: Any = op) -> Any:
            made.append(name)
            return op(*arguments)

        monkeypatch.setattr(sdpa, name, counted)
    return made


def tensors(T: int, S: int, D: int, H_kv: int = 4, **_: object) -> list[Tensor]:
    """q, k, v and d_out as [B, H, T, D], q as a view of [B, T, H, D] like in most models."""
    q = torch.randn(2, T, 4, D).transpose(1, 2)
    return [q, torch.randn(2, H_kv, S, D), torch.randn(2, H_kv, S, D), torch.randn(2, 4, T, D)]


def run(
    given: list[Tensor],
    device: str,
    dtype: torch.dtype,
    call: Callable[..., Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """out, dq, dk and dv of q, k, v and d_out, by scaled_dot_product_attention or `call`."""
    *leaves, d_out = (x.to(device, dtype) for x in given)
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = (call or scaled_dot_product_attention)(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


def assert_all_accurate(*results: list[Tensor]) -> None:
    for name, *one in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_as_accurate(*one, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_accurate_as_math(case: dict, compiled: bool, active: None, calls: list[str]) -> None:
    given = [x.bfloat16() for x in tensors(**case)]
    options = case["options"]
    torch._dynamo.reset()
    call = torch.compile(scaled_dot_product_attention, fullgraph=True)
    ours = run(given, "cuda", torch.bfloat16, call if compiled else None, **options)
    assert calls == ["attention_forward", "attention_backward"]
    with sdpa_kernel(SDPBackend.MATH):
        eager = run(given, "cuda", torch.bfloat16, **options)
        exact = run(given, "cuda", torch.float64, **options)
    assert len(calls) == 2
    assert_all_accurate(ours, eager, exact)


@pytest.mark.gpu
def test_pytorch_has_its_own_back(calls: list[str]) -> None:
    given = tensors(64, 64, 64)
    sdpa.activate()
    run(given, "cuda", torch.bfloat16)
    sdpa.restore()
    run(given, "cuda", torch.bfloat16)
    assert len(calls) == 2


@pytest.mark.gpu
def test_dropout_is_the_generators_and_the_same_backward(active: None) -> None:
    """With v and d_out all ones, out is the sum of what was kept, and so is what dv is made of."""
    q, k, _, _ = (x.cuda().bfloat16() for x in tensors(128, 128, 64))
    v = torch.ones_like(k).requires_grad_()
    sums = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
        assert abs(out.float().mean().item() - 1) < 0.02
        torch.testing.assert_close(
            dv.float().sum((2, 3)), out.float().sum((2, 3)), rtol=1e-2, atol=0
        )
        sums.append(out)
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("causal", [True, False])
def test_the_overrides_on_the_cpu(causal: bool, calls: list[str]) -> None:
    """The kernels in Triton's interpreter, called by the op that SDPA calls on a GPU."""
    given = tensors(20, 20, 16)

    def flash(*qkv: Tensor, is_causal: bool) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            *qkv, is_causal=is_causal, scale=0.3
        )[0]
        return out

    handle = sdpa.Handle("CPU")
    try:
        with interpreted("kernels.attention.portable"):
            ours = run(given, "cpu", torch.float32, flash, is_causal=causal)
    finally:
        handle.remove()
    assert calls == ["attention_forward", "attention_backward"]
    with sdpa_kernel(SDPBackend.MATH):
        eager, exact = (
            run(given, "cpu", dtype, is_causal=causal, scale=0.3)
            for dtype in (torch.float32, torch.float64)
        )
    assert_all_accurate(ours, eager, exact)


def test_comes_and_goes() -> None:
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.restore()
    sdpa.activate()
    assert current_flash_attention_impl() == "flashtrain"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.activate()
    sdpa.restore()
    assert current_flash_attention_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn


def test_an_older_torch_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    for call in (sdpa.activate, sdpa.restore):
        with pytest.raises(RuntimeError, match=r"has no torch\.nn\.attention\.register_flash"):
            call()
