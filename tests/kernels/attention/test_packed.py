"""Attention over one tensor of q, k and v, and one gradient, is attention over the three."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_packed

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "slopes": {"causal": True, "alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "documents": {"causal": True, "documents": True},
}
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(name: str, device: str) -> tuple[Tensor, dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    T = 200 if device == "cuda" else 20
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=device)
    if "documents" in options:
        options["documents"] = (torch.arange(T, device=device) // 7).expand(2, T).contiguous()
    return torch.randn(2, T, 4 + 2 * 2, 64, device=device, dtype=dtype), options


def both(qkv: Tensor, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, **options)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(out, qkv, torch.randn(out.shape, device=out.device).to(out.dtype))
    return out, grad


def apart(qkv: Tensor, **options: Any) -> Tensor:
    return attention(*qkv.split([4, 2, 2], dim=2), **options)


def packed(qkv: Tensor, **options: Any) -> Tensor:
    return attention_packed(qkv, 4, **options)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_as_with_three_tensors(name: str, backend: str, device: str) -> None:
    if device == "cpu" and backend == "triton":
        pytest.skip("test_hopper_emulated and the GPU look at the kernels")
    qkv, options = inputs(name, device)
    if device == "cuda" and backend == "torch" and name == "slopes":
        with pytest.raises(ValueError, match="PyTorch would add the bias"):
            packed(qkv, backend=backend, **options)
        return
    ours = both(qkv, packed, backend=backend, **options)
    theirs = both(qkv, apart, backend=backend, **options)
    for mine, other in zip(ours, theirs, strict=True):
        # hopper adds dQ up in no fixed order
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.01 * float(other.abs().max()))
    assert ours[1].is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_without_a_break(name: str) -> None:
    qkv, options = inputs(name, "cuda")
    compiled = torch.compile(packed, fullgraph=True)
    options["backend"] = "triton"  # whose sums have one order
    for mine, other in zip(
        both(qkv, compiled, **options), both(qkv, packed, **options), strict=True
    ):
        assert torch.equal(mine, other)


def test_heads_must_add_up() -> None:
    with pytest.raises(ValueError, match="8 heads are not 5 of q and as many of k as of v"):
        attention_packed(torch.zeros(1, 4, 8, 16), 5, causal=True)
