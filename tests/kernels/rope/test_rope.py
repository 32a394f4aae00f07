"""Heads turned in one pass are those that plain PyTorch turns, and nothing else is touched."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.rope import rotate, rotate_heads, rotate_heads_
from kernels.rope.op import check_table
from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import Platform

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


@dataclass(frozen=True)
class Case:
    heads: int  # that are turned
    others: int
    D: int
    R: int
    B: int = 2
    T: int = 5
    packs: bool = False  # a table for each sequence


CASES = {
    "whole heads": Case(6, 2, 16, 16),
    "one head": Case(1, 1, 32, 32, B=1, T=1),
    "a part of each": Case(5, 5, 16, 4),
    "no power of two": Case(3, 1, 20, 12, T=7),
    "documents": Case(8, 4, 8, 8, packs=True),
    "nothing behind": Case(12, 0, 64, 64, B=1, T=3),
}
EVERY = pytest.mark.parametrize("name", CASES)


def inputs(name: str, platform: Platform) -> tuple[Tensor, Tensor, int]:
    """x, with tokens that do not lie close together; its table, with a factor; heads."""
    case = CASES[name]
    B, T = (3 * case.B, 41 * case.T) if platform.on_gpu else (case.B, case.T)
    wide = torch.randn(B, T, case.heads + case.others + 3, case.D, device=platform.device)
    angles = 6 * torch.randn(*([B] if case.packs else []), T, case.R // 2, device=platform.device)
    table = 1.3 * torch.cat((angles.cos(), angles.sin()), dim=-1)
    return wide.to(platform.dtype)[:, :, 1:-2], table, case.heads


def expected(x: Tensor, table: Tensor, heads: int) -> Tensor:
    return torch.cat((rotate(x[:, :, :heads], table), x[:, :, heads:]), dim=2)


def gradient(x: Tensor, table: Tensor, heads: int) -> Tensor:
    """Of what was turned, by autograd, for x coming back."""
    leaf = torch.zeros_like(x).requires_grad_()
    (found,) = torch.autograd.grad(expected(leaf, table, heads), leaf, x)
    return found


@BACKENDS
@EVERY
@pytest.mark.parametrize("back", [False, True])
def test_turned_where_they_lie(name: str, back: bool, backend: str, platform: Platform) -> None:
    x, table, heads = inputs(name, platform)
    assert x._base is not None
    before, around = x.clone(), x._base.clone()
    way = gradient if back else expected
    eager = way(x, table, heads)
    rotate_heads_(x, table, heads, back, backend)
    assert_as_accurate(x, eager, way(before.double(), table.double(), heads))
    R = table.shape[-1]
    assert torch.equal(x[:, :, heads:], before[:, :, heads:])
    assert torch.equal(x[..., R:], before[..., R:])
    x.copy_(before)
    assert torch.equal(x._base, around)


@BACKENDS
@EVERY
def test_turned_into_a_new_tensor(name: str, backend: str, platform: Platform) -> None:
    x, table, heads = inputs(name, platform)
    before = x.clone()
    y = rotate_heads(x, table, heads, backend)
    assert torch.equal(x, before)
    assert y.is_contiguous()
    rotate_heads_(x, table, heads, False, backend)
    assert torch.equal(y, x)


@BACKENDS
def test_nothing_to_turn(backend: str, platform: Platform) -> None:
    for shape, heads, R in (((2, 0, 4, 8), 2, 8), ((0, 3, 4, 8), 2, 8), ((2, 3, 4, 8), 2, 0)):
        x = torch.randn(shape, device=platform.device).to(platform.dtype)
        table = torch.ones(shape[1], R, device=platform.device)
        assert torch.equal(rotate_heads(x, table, heads, backend), x)


@pytest.mark.gpu
def test_past_two_to_the_31_numbers() -> None:
    B, T, H, D = 3, 4096, 768, 256  # 2.4e9
    x = torch.ones(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    table = torch.cat((torch.zeros(T, D // 2), torch.ones(T, D // 2)), dim=-1).cuda()
    rotate_heads_(x, table, H)
    for place in ((0, 0, 0), (B - 1, T - 1, H - 1), (B - 1, 0, 0)):
        assert x[place].tolist() == [-1.0] * (D // 2) + [1.0] * (D // 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_library_checks_pass(device: str) -> None:
    x, table = torch.randn(2, 3, 4, 8, device=device), torch.randn(3, 8, device=device)
    torch.library.opcheck(rotate_heads, (x, table, 2))
    torch.library.opcheck(rotate_heads_, (x, table, 2, True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, torch"),
    "length": ({"table": torch.ones(4, 8)}, r"\[4, 8\] is not for heads \[2, 3, 4, 8\]: it must"),
    "batch": ({"table": torch.ones(1, 3, 8)}, r"float32 \[3, R\] or \[2, 3, R\]"),
    "width": ({"table": torch.ones(3, 10)}, "R even and at most 8"),
    "odd": ({"table": torch.ones(3, 5)}, "R even and at most 8"),
    "dtype": ({"table": torch.ones(3, 8).double()}, "a rotation of torch.float64"),
    "fp64": (
        {"x": torch.zeros(2, 3, 4, 8).double(), "backend": "triton"},
        "turns heads in fp32, bf16 or fp16, contiguous in their last dimension, not torch.float64",
    ),
    "strides": (
        {"x": torch.zeros(2, 3, 8, 4).mT, "backend": "triton"},
        r"with strides \(96, 32, 1, 4\): take backend='torch'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {"x": torch.zeros(2, 3, 4, 8), "table": torch.ones(3, 8), "heads": 2} | changes
    for turn in (rotate_heads, rotate_heads_):
        with pytest.raises(ValueError, match=sentence):
            turn(**given)


@pytest.mark.parametrize("packs", [False, True])
def test_a_compiler_may_take_some_sizes_for_symbols(packs: bool) -> None:
    def checked(x: Tensor, table: Tensor) -> Tensor:
        check_table(table, x)
        return x

    x, table = torch.randn(4, 16, 12, 8), torch.randn(*([4] if packs else []), 16, 8)
    torch._dynamo.maybe_mark_dynamic(x, [0, 1])
    run = torch.compile(checked, backend="aot_eager", fullgraph=True)
    assert run(x, table).shape == x.shape
