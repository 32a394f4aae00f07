"""Muon against the formulas written out matrix by matrix, in fp64 on one process; layouts and
checkpoints: tests/distributed/test_muon.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flashtrain.compose import resolve_model
from flashtrain.config import Mlp, ModelConfig, Moments, OptimizerConfig
from flashtrain.optim import muon
from flashtrain.optim.muon import Kind, Muon, cut, join, orthogonal, takes_muon
from flashtrain.parallel.layers import Part, split_rows
from flashtrain.parallel.mesh import ALONE, Axis

CONFIG = OptimizerConfig(lr=0.02, weight_decay=0.3, momentum=0.9)
MODEL = resolve_model(
    ModelConfig(
        n_layers=3, n_heads=4, n_kv_heads=2, d_model=16, head_size=4, mlp=Mlp.swiglu, d_ff=24,
        vocabulary=40,
    )
)  # fmt: skip
SHAPES = {
    "embedding.weight": (40, 16),
    **{
        f"blocks.{i}.{name}": shape
        for i in range(3)
        for name, shape in {
            "norm_attention.weight": (16,),
            "attention.qkv.weight": (32, 16),
            "attention.out.weight": (16, 16),
            "mlp.gate_up.weight": (48, 16),
            "mlp.down.weight": (16, 24),
        }.items()
    },
}
# rows of the matrices inside a weight, in the order of its rows
INSIDE = {"qkv": [16, 8, 8], "gate_up": [24, 24], "out": [16], "down": [16]}


def parameters() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def run(steps: int) -> tuple[dict[str, nn.Parameter], Muon]:
    ours = parameters()
    optimizer = Muon(ours, CONFIG, MODEL, ALONE, torch.float64)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            ours[name].grad = gradient
        optimizer.step()
    return ours, optimizer


def newton_schulz(x: Tensor) -> Tensor:
    """As Jordan et al. write it, for one matrix."""
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def plain(steps: int) -> dict[str, Tensor]:
    """The matrices of the blocks after some steps, one by one."""
    result = {}
    for name, parameter in parameters().items():
        if not name.startswith("blocks.") or parameter.dim() != 2:
            continue
        rows = INSIDE[name.split(".")[-2]]
        weights = [weight.detach() for weight in parameter.split(rows)]
        momenta = [torch.zeros_like(weight) for weight in weights]
        for step in range(steps):
            for i, gradient in enumerate(gradients(step)[name].split(rows)):
                momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
                direction = newton_schulz(0.1 * gradient + 0.9 * momenta[i])
                rate = 0.02 * 0.2 * math.sqrt(max(direction.shape))
                weights[i] = weights[i] * (1 - 0.02 * 0.3) - rate * direction
        result[name] = torch.cat(weights)
    return result


@pytest.mark.parametrize("limit", [muon.LIMIT, 1], ids=["together", "one by one"])
def test_steps_are_those_of_the_formulas(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "LIMIT", limit)
    ours, _ = run(3)
    for name, expected in plain(3).items():
        torch.testing.assert_close(ours[name].detach(), expected, rtol=1e-9, atol=1e-11, msg=name)


def test_what_is_no_matrix_of_a_block_takes_adamw() -> None:
    ours, optimizer = run(2)
    theirs = {name: p for name, p in parameters().items() if not takes_muon(name, p)}
    assert set(theirs) == {"embedding.weight"} | {n for n in SHAPES if "norm" in n}
    vectors = [p for name, p in theirs.items() if "norm" in name]
    groups = [
        {"params": [theirs["embedding.weight"]], "weight_decay": 0.3},
        {"params": vectors, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    for step in range(2):
        for name, parameter in theirs.items():
            parameter.grad = gradients(step)[name]
        reference.step()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-12, atol=0)
    for name, parameter in ours.items():
        keys = {"exp_avg", "exp_avg_sq", "step"} if name in theirs else {"momentum"}
        assert set(optimizer.state[parameter]) == keys, name


def test_tables_heads_and_vectors_are_no_matrices_of_blocks() -> None:
    matrix, vector = torch.empty(4, 4), torch.empty(4)
    assert takes_muon("blocks.0.mlp.up.weight", matrix)
    for name in ("embedding.weight", "head.weight", "position.weight"):
        assert not takes_muon(name, matrix)
    assert not takes_muon("blocks.0.mlp.up.bias", vector)


def test_a_rate_reaches_both_kinds() -> None:
    ours, optimizer = run(1)
    before = {name: p.detach().clone() for name, p in ours.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for name, gradient in gradients(1).items():
        ours[name].grad = gradient
    optimizer.step()
    assert all(torch.equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (56, 56)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_keeps_directions_and_evens_lengths(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(1)
    given = torch.randn(2, *shape, generator=draw).to(dtype)
    found = orthogonal(given).double()
    u, _, vt = torch.linalg.svd(given.double(), full_matrices=False)
    along = u.mT @ found @ vt.mT
    lengths = along.diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.3 and lengths.max() < 1.3
    assert lengths.median() > 0.7
    across = along - torch.diag_embed(lengths)
    assert across.abs().max() < (1e-3 if dtype is torch.float32 else 0.1)


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_updates_are_of_adamws_size_whatever_the_shape() -> None:
    before, after = parameters(), run(1)[0]
    for name in SHAPES:
        if takes_muon(name, before[name]):
            moved = after[name] - before[name] * (1 - 0.02 * 0.3)
            rms = float(moved.detach().square().mean().sqrt()) / 0.02
            assert 0.12 < rms < 0.25, (name, rms)


@pytest.mark.parametrize("ranks", [2, 4])
def test_matrices_cut_over_ranks_join_to_what_they_were(ranks: int) -> None:
    parts = [Part(16, unit=4), Part(8, unit=4, shared=True), Part(8, unit=4, shared=True)]
    pieces = [list(split_rows(parts, Axis(ranks, rank, None))[0]) for rank in range(ranks)]
    kind = Kind([], (32, 16), [16, 8, 8], pieces)
    whole = torch.randn(3, 32, 16)
    local = cut(whole, kind)
    assert local.shape == (ranks, 3, 16 if ranks == 2 else 12, 16)
    assert torch.equal(join(local, kind), whole)


def test_a_matrix_without_gradient_is_an_error() -> None:
    ours, optimizer = run(1)
    ours["blocks.1.mlp.down.weight"].grad = None
    with pytest.raises(ValueError, match="no gradient"):
        optimizer.step()


def test_what_the_device_says_skips_a_step_and_scales_gradients() -> None:
    """As on a GPU, where nobody waits for it."""

    def start() -> tuple[dict[str, nn.Parameter], Muon]:
        ours = {name: nn.Parameter(p.detach().float()) for name, p in parameters().items()}
        config = replace(CONFIG, moments=Moments.bf16)  # in a step that reads `found_inf` anywhere
        return ours, Muon(ours, config, MODEL, ALONE, torch.float32)

    def step(ours: dict[str, nn.Parameter], optimizer: Muon, number: int, factor: float) -> None:
        for name, gradient in gradients(number).items():
            ours[name].grad = factor * gradient.float()
        optimizer.step()

    (plain_, expected), (ours, optimizer) = start(), start()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(4.0)
    for number in range(3):
        step(plain_, expected, number, 1.0)
        step(ours, optimizer, number, 4.0)
        before = {name: p.detach().clone() for name, p in ours.items()}
        states = copy.deepcopy([optimizer.state[p] for p in ours.values()])
        optimizer.found_inf.fill_(1.0)
        step(ours, optimizer, number, float("nan"))
        optimizer.found_inf.fill_(0.0)
        for name, parameter in ours.items():
            assert torch.equal(parameter, before[name]), name
            torch.testing.assert_close(parameter, plain_[name], rtol=1e-5, atol=1e-6)
        for parameter, state in zip(ours.values(), states, strict=True):
            for key, value in state.items():
                assert torch.equal(optimizer.state[parameter][key], value), key


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing_and_is_that_of_the_formulas() -> None:
    ours = {
        name: nn.Parameter(p.detach().to("cuda", torch.float32)) for name, p in parameters().items()
    }
    optimizer = Muon(ours, CONFIG, MODEL, ALONE, torch.float32)
    for step in range(3):
        for name, gradient in gradients(step).items():
            ours[name].grad = gradient.to("cuda", torch.float32)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, expected in plain(3).items():
        found = ours[name].detach().double().cpu()
        # Newton-Schulz magnifies float32's roundings up to 485 times
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
