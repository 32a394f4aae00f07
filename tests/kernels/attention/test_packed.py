"""Attention over one tensor of q, k and v, and one gradient, is attention over the three."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_packed
from kernels.attention.packed import _backward as packed_backward
from kernels.attention.registration import N_TENSORS, attention_forward
from kernels.rope import rotate
from tests.kernels.interpreter import Platform

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
    return out.detach(), grad


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


def table_for(qkv: Tensor, packs: bool, R: int = 64) -> Tensor:
    """Angles of positions, or of each sequence's own, with a factor as YaRN has."""
    B, T = qkv.shape[:2]
    angles = torch.randn(*([B] if packs else []), T, R // 2, device=qkv.device) * 4
    return 1.3 * torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotated(qkv: Tensor, table: Tensor, **options: Any) -> Tensor:
    return attention_packed(2 * qkv, 4, rotation=table, **options)


def rotated_apart(qkv: Tensor, table: Tensor, **options: Any) -> Tensor:
    q_and_k, v = (2 * qkv).split([6, 2], dim=2)
    return apart(torch.cat((rotate(q_and_k, table), v), dim=2), **options)


@pytest.mark.parametrize("R", [64, 24])
@pytest.mark.parametrize("name", ["causal", "documents"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
def test_heads_are_turned_and_gradients_turned_back(
    backend: str, in_place: bool, name: str, R: int, platform: Platform
) -> None:
    qkv, options = inputs(name, platform.device)
    table = table_for(qkv, name == "documents", R)
    chosen = {"table": table, "backend": backend, **options}
    ours = both(qkv, rotated, in_place=in_place, **chosen)
    theirs = both(qkv, rotated_apart, **chosen)
    for mine, other in zip(ours, theirs, strict=True):
        bound = 0.01 if platform.on_gpu else 1e-6
        torch.testing.assert_close(
            mine, other, rtol=2 * bound, atol=bound * float(other.abs().max())
        )


def test_memory_is_only_overwritten_where_it_may_be(platform: Platform) -> None:
    qkv, options = inputs("causal", platform.device)
    table = table_for(qkv, packs=False)
    options |= {"rotation": table, "backend": "triton"}
    before = qkv.clone()
    leaf = qkv.requires_grad_()
    attention_packed(leaf, 4, **options)
    assert torch.equal(leaf, before)
    for own in (leaf, leaf.transpose(0, 1).transpose(0, 1)):
        with pytest.raises(ValueError, match="would turn the heads of a leaf"):
            attention_packed(own, 4, in_place=True, **options)
        with pytest.raises(ValueError, match="would turn the heads of a leaf"):
            torch.compile(attention_packed)(own, 4, in_place=True, **options)
    assert torch.equal(leaf, before)
    kept = leaf.exp()  # whose backward reads it again
    out = attention_packed(kept, 4, in_place=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.no_grad():
        mine = before.clone()
        attention_packed(mine, 4, in_place=True, **options)
    assert torch.equal(mine[:, :, 6:], before[:, :, 6:])
    turned = rotate(before[:, :, :6], table)
    rounding = torch.finfo(mine.dtype).eps * float(turned.abs().max())
    torch.testing.assert_close(mine[:, :, :6], turned, rtol=0, atol=rounding)


def test_compiled_it_overwrites_nothing_that_is_read_again(platform: Platform) -> None:
    """A copy is made where one is needed; what autograd keeps is refused as without compiling."""
    qkv, options = inputs("causal", platform.device)
    options |= {"rotation": table_for(qkv, packs=False), "backend": "triton"}

    def read_elsewhere(qkv: Tensor, in_place: bool) -> Tensor:
        heads = 2 * qkv
        sums = heads.flatten(2).sum(-1)
        return attention_packed(heads, 4, in_place=in_place, **options) * sums[..., None, None]

    def kept(qkv: Tensor, in_place: bool) -> Tensor:
        return attention_packed(qkv.exp(), 4, in_place=in_place, **options)

    ours = both(qkv, torch.compile(read_elsewhere, fullgraph=True), in_place=True)
    for mine, other in zip(ours, both(qkv, read_elsewhere, in_place=False), strict=True):
        bound = 0.02 if platform.on_gpu else 1e-5
        torch.testing.assert_close(mine, other, rtol=0, atol=bound * float(other.abs().max()))
    with pytest.raises(Exception, match="modified by an inplace operation"):
        both(qkv, torch.compile(kept, fullgraph=True), in_place=True)


def test_library_checks_pass(platform: Platform) -> None:
    qkv, _ = inputs("causal", platform.device)
    table, q_k_v = table_for(qkv, packs=False), qkv.split([4, 2, 2], dim=2)
    options = (*(None,) * N_TENSORS, 0.125, -1, 0, 0.0, 0.0, False, "triton")
    out, lse = attention_forward(*q_k_v, *options)
    for rotation in (None, table):
        given = (torch.randn_like(out), qkv, 4, rotation, out, lse, *options)
        torch.library.opcheck(packed_backward, given)


def test_a_rotation_must_fit() -> None:
    with pytest.raises(ValueError, match=r"\[5, 16\] is not for heads \[1, 4, 8, 16\]"):
        attention_packed(torch.zeros(1, 4, 8, 16), 4, causal=True, rotation=torch.ones(5, 16))


def test_heads_must_add_up() -> None:
    with pytest.raises(ValueError, match="8 heads are not 5 of q and as many of k as of v"):
        attention_packed(torch.zeros(1, 4, 8, 16), 5, causal=True)
