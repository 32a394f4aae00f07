"""Muon on every layout it takes against one process: losses, norms, weights and momenta after some
steps, and resumption bit for bit, on the same layout and on another."""

from pathlib import Path

import pytest
import torch

from flashtrain.config import Config
from flashtrain.parallel.mesh import ALONE
from tests.distributed.test_matrix import (
    MODELS,
    ON_GPUS,
    SAVED,
    STEPS,
    B,
    Layout,
    Reference,
    build,
    check_layout,
    check_two_gpus,
    halve_embedding,
    look,
    restore,
    save,
    train,
)
from tests.harness import run_ranks

OTHERS = ("optimizer=muon", "optimizer.eps=1e-3")


def muon(name: str, model: str, micro_batch: int, **degrees: int) -> Layout:
    return Layout(name, model, degrees, micro_batch, OTHERS)


# two blocks: on four ranks, some have no matrix of their own to work on
WORLDS = {
    1: [muon("one", "gpt2", 4), muon("one_llama", "llama", 4)],
    2: [
        muon("tensor2_gpt2", "gpt2", 12, tensor=2),
        muon("tensor2_llama", "llama", 12, tensor=2),
        muon("data2", "llama", 3, replicate=2),
        muon("context2", "llama", 12, context=2, shard_context=0),  # copies, as on data ranks
    ],
    4: [
        muon("tensor2_data2", "gpt2", 3, tensor=2, replicate=2),
        muon("tensor4", "llama", 12, tensor=4),
    ],
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """By model."""
    found = {}
    for model in MODELS:
        folder = tmp_path_factory.mktemp(f"muon_{model}")
        config = muon("one", model, B).config(1)
        engine, mesh = build(config, 1)
        losses, norms = train(engine, mesh, B, 0, SAVED)
        save(folder, SAVED, engine, mesh)
        more = train(engine, mesh, B, SAVED, STEPS)
        save(folder, STEPS, engine, mesh)
        found[model] = Reference(
            config, losses + more[0], norms + more[1], *look(engine, mesh),
            halve_embedding(engine, mesh), folder,
        )  # fmt: skip
    return found


def check_layouts(
    layouts: list[Layout], configs: list[Config], references: dict[str, Reference], folder: Path
) -> None:
    for layout, config in zip(layouts, configs, strict=True):
        check_layout(config, layout.micro_batch, references[layout.model], folder / layout.name)


@pytest.mark.parametrize("world", WORLDS, ids=lambda n: f"{n} ranks")
def test_every_layout_equals_one_process(
    world: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    layouts = WORLDS[world]
    configs = [layout.config(world) for layout in layouts]
    run_ranks(check_layouts, world, tmp_path, layouts, configs, references, tmp_path, limit=300)
    for layout in layouts:
        check_files(layout, references[layout.model], tmp_path / layout.name)


def check_files(layout: Layout, expected: Reference, folder: Path) -> None:
    """One process reads what the ranks wrote and goes on from there.

    The smallest singular values come out of five rounds 3.4445^5 = 485 times as large, and with
    them the roundings of fp32 that other orders of summation leave: 485 x 2^-24 = 3e-5.
    """
    found, wanted = build(expected.config, 1)[0], build(expected.config, 1)[0]
    restore(folder / f"step-{STEPS:08d}", found)
    restore(expected.folder / f"step-{STEPS:08d}", wanted)
    ours, theirs = found.state(), wanted.state()
    assert ours.scalars == theirs.scalars
    assert set(ours.tensors) == set(theirs.tensors)
    for name, local in theirs.tensors.items():
        scale = float(local.tensor.detach().abs().max())
        worst = float((ours.tensors[name].tensor - local.tensor).detach().abs().max())
        assert worst <= 1e-4 * scale, f"{layout.name}: {name} is off by {worst} of {scale}"
    restore(folder / f"step-{SAVED:08d}", found)
    losses, _ = train(found, ALONE, B, SAVED, STEPS)
    torch.testing.assert_close(losses, expected.losses[SAVED:], rtol=1e-5, atol=0.0)


def test_momentum_is_saved_under_the_names_of_whole_matrices(
    references: dict[str, Reference],
) -> None:
    engine, mesh = build(references["gpt2"].config, 1)
    train(engine, mesh, B, 0, 1)
    names = set(engine.state().tensors)
    assert "optimizer/momentum/blocks.1.attention.qkv.weight" in names
    assert "optimizer/exp_avg/blocks.1.attention.qkv.weight" not in names
    assert "optimizer/exp_avg_sq/embedding.weight" in names
    local = engine.state().tensors["optimizer/momentum/blocks.1.mlp.up.weight"]
    assert local.shape == (128, 32) and local.tensor.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_two_gpus_equal_one(precision: str, tolerance: float, tmp_path: Path) -> None:
    layouts = [muon("tensor2", "llama", 3, tensor=2), muon("data2", "llama", 3, replicate=2)]
    one = muon("one", "llama", B)
    for layout in (one, *layouts):
        layout.others = (*OTHERS, *ON_GPUS, f"precision={precision}")
    configs = [layout.config(2) for layout in layouts]
    arguments = (one.config(1), configs, tolerance)
    run_ranks(check_two_gpus, 2, tmp_path, *arguments, backend="nccl", limit=600)
