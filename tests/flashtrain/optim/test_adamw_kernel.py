"""Our own step: as PyTorch's; bf16 moments: what is kept, what a bad step leaves, what a checkpoint
holds, how it trains."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flashtrain import checkpoint
from flashtrain.checkpoint.state import collect, prepare
from flashtrain.config import ModelConfig, Moments, OptimizerConfig
from flashtrain.optim import step_unless_bad
from flashtrain.optim.adamw import build_adamw
from flashtrain.optim.adamw_kernel import KernelAdamW

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MODEL = ModelConfig(n_layers=1, n_heads=1, d_model=8)


def made(moments: Moments, device: str = "cpu", lr: float = 0.01) -> tuple[nn.Module, KernelAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(device)
    config = OptimizerConfig(lr=lr, moments=moments)
    optimizer = build_adamw(dict(model.named_parameters()), config, MODEL)
    return model, optimizer  # type: ignore[return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of learning a fixed linear map from fresh noise."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(8, 8, generator=generator).to(device)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 8, generator=generator).to(device)
        loss = (model(x) - torch.tanh(x @ target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        step_unless_bad(optimizer, torch.ones((), device=device))
        losses.append(loss.item())
    return losses


@DEVICES
def test_moments_take_half_and_the_weights_stay_fp32(device: str) -> None:
    model, optimizer = made(Moments.bf16, device)
    train(model, optimizer, 2)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert parameter.dtype == torch.float32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].item() == 2


@DEVICES
def test_it_trains_as_fp32_moments_do(device: str) -> None:
    plain, ours = (train(*made(moments, device), 200) for moments in Moments)
    assert ours != plain
    assert ours[0] == plain[0]
    assert plain[-1] < 0.5 * plain[0]
    assert abs(sum(ours[-20:]) / sum(plain[-20:]) - 1) < 0.05


@DEVICES
def test_a_bad_step_leaves_weights_moments_and_counts(device: str) -> None:
    model, optimizer = made(Moments.bf16, device)
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_unless_bad(optimizer, torch.full((), float("nan"), device=device))
    for parameter, old, state in zip(model.parameters(), before, states, strict=True):
        assert torch.equal(parameter, old)
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value), key


@pytest.mark.gpu
def test_fp32_moments_step_as_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large parameters by our kernel, small ones together by PyTorch's."""
    monkeypatch.setattr("flashtrain.optim.adamw_kernel.LARGE", 100)
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to("cuda")
        parameters = dict(model.named_parameters())
        assert {p.numel() < 100 for p in parameters.values()} == {True, False}
        optimizer = build_adamw(parameters, OptimizerConfig(lr=0.01), MODEL, ours=ours)
        assert isinstance(optimizer, KernelAdamW) == ours
        for step in range(5):
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            norm = torch.full((), 3.0 if step != 2 else float("nan"), device="cuda")
            step_unless_bad(optimizer, norm, clip_norm=1.0)
        assert all(state["step"].item() == 4 for state in optimizer.state.values())
        results.append([*parameters.values()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_keeps_the_dtype_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    peers = checkpoint.Peers(None)
    model, optimizer = made(Moments.bf16)
    train(model, optimizer, 3)
    path = checkpoint.save(tmp_path, 3, collect(model, optimizer), {}, peers=peers)
    other, fresh = made(Moments.bf16)
    prepare(dict(other.named_parameters()), fresh, checkpoint.saved_names(path))
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in fresh.state.values())
    checkpoint.load(path, collect(other, fresh))
    assert train(other, fresh, 3) == train(model, optimizer, 3)
    wide, plain = made(Moments.fp32)
    prepare(dict(wide.named_parameters()), plain, checkpoint.saved_names(path))
    with pytest.raises(checkpoint.CheckpointError, match="bfloat16"):
        checkpoint.load(path, collect(wide, plain))
