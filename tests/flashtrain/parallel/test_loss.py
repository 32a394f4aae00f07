from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from flashtrain.parallel import loss as loss_module
from flashtrain.parallel.collectives import slice_sequence
from flashtrain.parallel.loss import cross_entropy_sum, linear_cross_entropy_sum
from flashtrain.parallel.mesh import SINGLE, build_mesh
from tests.harness import run_ranks


def problem(dtype: torch.dtype, vocabulary: int = 24) -> tuple[Tensor, Tensor]:
    """Logits [2, 7, V] that need the maximum taken out (exp overflows fp32 at 89), and labels."""
    draw = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(2, 7, vocabulary, generator=draw, dtype=torch.float64)
    labels = torch.randint(vocabulary, (2, 7), generator=draw)
    labels[0, 1] = labels[1, 6] = -100
    logits[1, 2] += 100
    return logits.to(dtype), labels


def expected(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of `scale` x loss by PyTorch in fp64."""
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss * scale).backward()
    assert exact.grad is not None
    return loss.detach(), exact.grad


def check_close(loss: Tensor, grad: Tensor, logits: Tensor, labels: Tensor, part: slice) -> None:
    true_loss, true_grad = expected(logits, labels, scale=0.125)
    assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert grad.dtype == logits.dtype
    tight = 1e-12 if logits.dtype is torch.float64 else 2e-6
    assert_close(loss.double(), true_loss, rtol=tight, atol=0)
    # one rounding of a value below 0.125 to bf16 is 2**-3 / 2**9
    loose = 2.5e-4 if logits.dtype is torch.bfloat16 else tight
    assert_close(grad.double(), true_grad[..., part], rtol=0, atol=loose)


@pytest.mark.parametrize("chunk", [1, 100, 2**25])  # 1 row, 4 rows (14 is no multiple), all
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_rank_equals_torch(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    logits, labels = problem(dtype)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_sum(leaf, labels, SINGLE)
    (loss * 0.125).backward()
    assert leaf.grad is not None
    assert_close(leaf.detach(), logits, rtol=0, atol=0)  # the caller's logits are left alone
    check_close(loss.detach(), leaf.grad, logits, labels, slice(None))


def test_all_labels_ignored_give_zero() -> None:
    logits, labels = problem(torch.float32)
    leaf = logits.requires_grad_()
    loss = cross_entropy_sum(leaf, torch.full_like(labels, -100), SINGLE)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert leaf.grad.count_nonzero() == 0


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(2, 7\), not \(2, 6\)"):
        cross_entropy_sum(torch.zeros(2, 7, 8), torch.zeros(2, 6, dtype=torch.int64), SINGLE)


def test_it_compiles_whole() -> None:
    logits, labels = problem(torch.float32)
    traced = torch.compile(cross_entropy_sum, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    loss = traced(leaf, labels, SINGLE)
    (loss * 0.125).backward()
    assert leaf.grad is not None
    check_close(loss.detach(), leaf.grad, logits, labels, slice(None))


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_equal_torch(ranks: int, tmp_path: Path) -> None:
    run_ranks(check_vocabulary_shards, ranks, tmp_path)


def check_vocabulary_shards() -> None:
    axis = build_mesh(torch.distributed.get_world_size()).tensor
    loss_module.CHUNK = 50
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, labels = problem(dtype)
        words = logits.size(-1) // axis.size
        part = slice(axis.rank * words, axis.rank * words + words)
        functions = [cross_entropy_sum]
        if dtype is torch.float32 and axis.size == 2:
            compiled = torch.compile(cross_entropy_sum, fullgraph=True, backend="aot_eager")
            functions.append(compiled)
        for function in functions:
            leaf = logits[..., part].clone().requires_grad_()
            loss = function(leaf, labels, axis, part.start)
            (loss * 0.125).backward()
            assert leaf.grad is not None
            check_close(loss.detach(), leaf.grad, logits, labels, part)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_the_head_equal_torch(ranks: int, tmp_path: Path) -> None:
    run_ranks(check_shards_of_the_head, ranks, tmp_path)


def check_shards_of_the_head() -> None:
    """Hidden states split along the tokens, the head along the vocabulary, logits nowhere."""
    axis = build_mesh(torch.distributed.get_world_size()).tensor
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 6, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(24, 6, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.randint(24, (2, 8), generator=draw)
    labels[0, 1] = labels[1, 6] = -100
    logits = 2 * torch.tanh(F.linear(hidden, weight) / 2)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected * 0.125).backward()
    assert hidden.grad is not None and weight.grad is not None

    own_hidden, own_weight = (
        part.detach().clone().requires_grad_()
        for part in (slice_sequence(hidden, axis), weight.chunk(axis.size)[axis.rank])
    )
    loss = linear_cross_entropy_sum(own_hidden, own_weight, labels, axis, softcap=2.0)
    (loss * 0.125).backward()
    assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_close(own_hidden.grad, slice_sequence(hidden.grad, axis))
    assert_close(own_weight.grad, weight.grad.chunk(axis.size)[axis.rank])
