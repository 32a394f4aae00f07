"""The public function: what it refuses, what autograd may do with it, and the defaults."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear_cross_entropy import VocabularyShard, linear_cross_entropy, rows_torch
from kernels.linear_cross_entropy.tiles import chunk_tokens


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, 7, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(30, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(30, (2, 7))
    labels[1, 2] = -100
    return hidden, weight, labels


def test_float64_equals_the_reference_to_its_last_digits() -> None:
    hidden, weight, labels = tensors()
    options: dict[str, Any] = {"softcap": 2.0, "z_loss": 0.1}
    results = []
    for backend in ("torch", "reference"):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=4, backend=backend, **options)
        results.append([loss, *torch.autograd.grad(loss * 0.7, [hidden, weight])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen: str) -> None:
    hidden, weight, labels = tensors()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    leaves = {"hidden": hidden.detach(), "weight": weight.detach()}
    other = next(name for name in leaves if name != frozen)
    leaves[other].requires_grad_()
    linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, chunk=4).backward()
    assert leaves[frozen].grad is None
    expected = dict(zip(("hidden", "weight"), whole, strict=True))[other]
    torch.testing.assert_close(leaves[other].grad, expected)


def test_no_gradient_is_computed_where_none_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(rows_torch, "measure_and_differentiate", refuse)
    hidden, weight, labels = tensors()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    torch.testing.assert_close(frozen, loss)


def test_gradients_accumulate_over_calls() -> None:
    hidden, weight, labels = tensors()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)[0]
    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels).backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_no_token_gives_zero() -> None:
    hidden, weight, labels = tensors()
    empty = hidden.detach()[:, :0].requires_grad_()
    loss = linear_cross_entropy(empty, weight, labels[:, :0])
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_a_second_backward_is_refused() -> None:
    hidden, weight, labels = tensors()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradients over once"):
        loss.backward()


def test_it_breaks_a_compiled_graph_and_stays_right() -> None:
    hidden, weight, labels = tensors()

    def head(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels) / 3

    compiled = torch.compile(head, backend="aot_eager")
    grads = [torch.autograd.grad(f(hidden), [hidden, weight]) for f in (head, compiled)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def same(statistics: Tensor) -> Tensor:
    return statistics


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton"),
    "width": ({"weight": torch.zeros(30, 13)}, r"must share D, got \[2, 7, 12\] and \[30, 13\]"),
    "labels": (
        {"labels": torch.zeros(2, 6, dtype=torch.int64)},
        r"labels of shape \[2, 7\], not \[2, 6\]",
    ),
    "label dtype": ({"labels": torch.zeros(2, 7)}, "labels are torch.float32"),
    "dtype": ({"weight": torch.zeros(30, 12, dtype=torch.int8)}, "weight torch.int8: floats"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
    "z_loss": ({"z_loss": -1.0}, "z_loss=-1.0 must be 0 or more"),
    "chunk": ({"chunk": 0}, "chunk=0 must be at least 1 token"),
    "label": (
        {"labels": torch.full((2, 7), 30)},
        "label 30 is neither in the vocabulary of 30 words nor ignore_index=-100",
    ),
    "shard": (
        {"shard": VocabularyShard(20, 45, same)},
        "shard of 30 words from word 20 does not lie in a vocabulary of 45",
    ),
    "reference": (
        {"shard": VocabularyShard(0, 60, same), "backend": "reference"},
        "it takes no shard",
    ),
    "float64": ({"backend": "triton"}, "backend='triton' does not compute float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    hidden, weight, labels = tensors()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, **changes}
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("tokens", [0, 1, 100, 1024, 5000, 16384, 32768, 100_001])
def test_chunks_are_an_eighth_where_that_is_enough(tokens: int) -> None:
    chunk = chunk_tokens(tokens)
    assert chunk >= 1
    assert chunk <= max(tokens / 8, 2048)
    assert -(-tokens // chunk) <= 9  # no tiny chunk is left over
