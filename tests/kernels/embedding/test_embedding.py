"""Rows by number, and a gradient that is as accurate as PyTorch's and always the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.embedding import embedding, op
from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import Platform

# tokens: how long runs of equal ones are decides who adds up what
KINDS = ("all words once", "one word", "two words", "natural", "long runs", "few")


def tokens_of(kind: str, words: int, count: int) -> Tensor:
    match kind:
        case "all words once":
            return torch.randperm(words)[:count]
        case "one word":
            return torch.full((count,), words - 1)
        case "two words":
            return torch.randint(2, (count,)) * (words - 1)
        case "natural":  # Zipf's law
            weights = 1 / torch.arange(1, words + 1).double()
            return torch.multinomial(weights, count, replacement=True)
        case "long runs":
            return (torch.arange(count) // 40 * 7) % words
    return torch.randint(words, (3,))


def run(tokens: Tensor, weight: Tensor, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    weight = weight.detach().clone().requires_grad_()
    if backend is None:
        y = F.embedding(tokens, weight).to(dtype)
    else:
        y = embedding(tokens, weight, dtype, backend=backend)
    torch.manual_seed(1)
    seed = torch.randn(y.shape, dtype=torch.float32, device=y.device).to(dtype)
    return [y, *torch.autograd.grad(y, weight, seed)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("words", "width"), [(50, 40), (17, 96)])
def test_as_accurate_as_eager(kind: str, words: int, width: int, platform: Platform) -> None:
    scale = 64 if platform.on_gpu else 1
    tokens = tokens_of(kind, words * scale, 123 * scale).to(platform.device)
    weight = torch.randn(words * scale, width, device=platform.device)
    ours = run(tokens, weight, platform.dtype, "triton")
    assert torch.equal(ours[0], F.embedding(tokens, weight).to(platform.dtype))
    low = run(tokens, weight, platform.dtype, None)[1]
    wide = weight.double().requires_grad_()
    torch.manual_seed(1)
    seed = torch.randn(ours[0].shape, dtype=torch.float32, device=platform.device)
    seed = seed.to(platform.dtype).double()
    (exact,) = torch.autograd.grad(F.embedding(tokens, wide), wide, seed)
    assert ours[1].dtype == torch.float32
    assert_as_accurate(ours[1], low, exact, terms=float(exact.abs().max()))
    assert not ours[1][exact.abs().sum(1) == 0].any()  # nothing where no token is


def test_tokens_of_any_shape_and_of_32_bits(platform: Platform) -> None:
    tokens = torch.randint(20, (3, 5), device=platform.device)
    weight = torch.randn(20, 24, device=platform.device)
    y = embedding(tokens, weight, platform.dtype, backend="triton")
    assert y.shape == (3, 5, 24)
    assert torch.equal(y, embedding(tokens.int(), weight, platform.dtype, backend="triton"))


def test_more_words_than_sixteen_bits_count(platform: Platform) -> None:
    tokens = torch.tensor([0, 65_535, 65_536, 70_000, 32_768, 65_536], device=platform.device)
    weight = torch.zeros(70_001, 8, device=platform.device).requires_grad_()
    embedding(tokens, weight, platform.dtype, backend="triton").sum().backward()
    assert weight.grad is not None
    found = weight.grad[:, 0].nonzero().flatten()
    assert found.tolist() == [0, 32_768, 65_535, 65_536, 70_000]
    assert weight.grad[65_536, 0] == 2


def test_a_token_that_is_no_word_is_not_a_number(platform: Platform) -> None:
    tokens = torch.tensor([3, 20, -1], device=platform.device)
    weight = torch.randn(20, 24, device=platform.device).requires_grad_()
    y = embedding(tokens, weight, platform.dtype, backend="triton")
    assert y[0].isfinite().all() and y[1:].isnan().all()
    y.backward(torch.ones_like(y))
    assert weight.grad is not None
    assert weight.grad[3].tolist() == [1.0] * 24 and weight.grad.sum() == 24


@pytest.mark.gpu
def test_the_gradient_does_not_vary() -> None:
    tokens = tokens_of("natural", 50_000, 30_000).to("cuda")
    weight = torch.randn(50_000, 768, device="cuda")
    first = run(tokens, weight, torch.bfloat16, "triton")[1]
    for _ in range(10):
        assert torch.equal(run(tokens, weight, torch.bfloat16, "triton")[1], first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_without_a_break(device: str) -> None:
    tokens, weight = torch.randint(20, (40,), device=device), torch.randn(20, 24, device=device)
    compiled = torch.compile(lambda t, w: embedding(t, w, torch.float32), fullgraph=True)
    assert torch.equal(compiled(tokens, weight), F.embedding(tokens, weight))


def test_library_checks_pass(platform: Platform) -> None:
    tokens = torch.randint(20, (12,), device=platform.device)
    weight = torch.randn(20, 8, device=platform.device)
    torch.library.opcheck(op._gather, (tokens, weight, platform.dtype))
    dy = torch.randn(12, 8, device=platform.device, dtype=platform.dtype)
    torch.library.opcheck(op._gradient, (tokens, dy, 20, torch.float32))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, torch"),
    "tokens": ({"tokens": torch.zeros(2)}, "tokens are torch.float32"),
    "weight": ({"weight": torch.zeros(2)}, r"weight \[2\]: int64 or int32 and \[V, D\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {"tokens": torch.zeros(2, dtype=torch.int64), "weight": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match=sentence):
        embedding(**{**given, "dtype": torch.float32, **changes})
