"""The loss without logits, on 2 tensor ranks and through a whole GPT, is that of the logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.config import LossConfig
from flashtrain.engine.native import SummedLoss
from flashtrain.model.gpt import GPT
from flashtrain.parallel.gradients import sum_partial_gradients
from flashtrain.parallel.layers import gather_whole
from flashtrain.parallel.mesh import SINGLE, Axis, build_mesh
from tests.distributed.test_tensor_parallel import batch, build
from tests.harness import run_ranks


def backward(model: GPT, axis: Axis, loss: LossConfig) -> Tensor:
    value = SummedLoss(model, axis, loss)(*batch(model.embedding.weight.device))
    (value * 0.3).backward()
    sum_partial_gradients(model.parameters(), axis)
    return value.detach()


@pytest.mark.parametrize("variant", ["gpt2", "one key head"])  # tied head; with softcap
def test_two_ranks_without_logits_equal_one_with_them(variant: str, tmp_path: Path) -> None:
    run_ranks(check_equal, 2, tmp_path, variant, torch.float64, "cpu", 1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_without_logits_equal_one_with_them(tmp_path: Path) -> None:
    arguments = ("gpt2", torch.float32, "cuda", 1e-4)
    run_ranks(check_equal, 2, tmp_path, *arguments, backend="nccl", limit=300)


def check_equal(variant: str, dtype: torch.dtype, device: str, tolerance: float) -> None:
    axis = build_mesh(2).tensor
    dense, split = (build(variant, part, dtype, device=device) for part in (SINGLE, axis))
    dense.to(dtype), split.to(dtype)
    expected = backward(dense, SINGLE, LossConfig(fused=False))
    assert_close(backward(split, axis, LossConfig()), expected, rtol=tolerance, atol=0)
    for (name, ours), theirs in zip(split.named_parameters(), dense.parameters(), strict=True):
        error = torch.linalg.vector_norm(gather_whole(ours, axis, ours.grad) - theirs.grad)
        assert error <= tolerance * torch.linalg.vector_norm(theirs.grad), name

    # with z-loss there is no such twin: one rank is compared with two
    dense.zero_grad(), split.zero_grad()
    z_loss = LossConfig(z_loss=0.05)
    with_z = backward(dense, SINGLE, z_loss)
    assert with_z > expected
    assert_close(backward(split, axis, z_loss), with_z, rtol=tolerance, atol=0)
    for (name, ours), theirs in zip(split.named_parameters(), dense.parameters(), strict=True):
        error = torch.linalg.vector_norm(gather_whole(ours, axis, ours.grad) - theirs.grad)
        assert error <= tolerance * torch.linalg.vector_norm(theirs.grad), name
