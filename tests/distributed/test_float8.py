"""fp8 layers on two ranks: the same training as on one, but for where scales are taken."""

import math
from pathlib import Path

import torch

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.data.source import open_loader
from flashtrain.model.float8_product import Float8Product
from flashtrain.parallel.mesh import ALONE, mesh_of
from tests.harness import run_ranks

CPU = torch.device("cpu")
STEPS = 3
TINY = [
    "experiment=null", "data=random", "model.vocabulary=64", "model.d_model=64",
    "model.n_layers=2", "model.n_heads=4", "data.sequence_length=16", "data.batch_size=8",
    "data.micro_batch_size=2", "trainer.compile=false", "tracking=quiet", "attention=reference",
    "model.mlp=swiglu", "model.d_ff=96",
]  # fmt: skip
KINDS = ("fp8_tensorwise", "fp8_rowwise")
# kinds, overrides, limits of the differences in loss and norm: tensor ranks take the scales of
# their own part of a weight, FSDP those of rounded weights; elsewhere the casts are the very same
LAYOUTS = [
    (KINDS, ["parallel.tensor=2"], 1e-3, 0.02),
    (KINDS[:1], ["parallel.tensor=2", "trainer.recompute=selective"], 1e-3, 0.02),
    (KINDS, ["parallel.shard=2", "parallel.zero=3"], 1e-3, 0.02),
    (KINDS[:1], ["parallel.replicate=2"], 1e-6, 1e-6),
    (KINDS[1:], ["parallel.pipeline=2"], 1e-6, 1e-6),
]


def curve(precision: str, overrides: list[str], world: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of some steps, the same batch in each."""
    degrees = ["parallel.tensor=1", "parallel.shard=1", f"precision={precision}"]
    config = load([*TINY, *degrees, *overrides], world)
    mesh = mesh_of(config.parallel) if world > 1 else ALONE
    engine = build_engine(config, mesh, CPU)
    models = [stage.model for stage in engine.stages] if mesh.pipeline.size > 1 else [engine.model]  # type: ignore[attr-defined]
    found = [m for model in models for m in model.modules() if isinstance(m, Float8Product)]
    assert len(found) == (0 if precision == "bf16" else 8 // mesh.pipeline.size)
    assert all(m.keeps_weight == (mesh.shard.size == 1) for m in found)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, CPU)
    losses = []
    for _ in range(STEPS):
        loss = engine.forward_backward(loader.step(0))
        losses.append((loss.item(), engine.step(3e-3).item()))
    loader.close()
    return losses


def on_two(one: dict[str, list[tuple[float, float]]]) -> None:
    for kinds, overrides, *limits in LAYOUTS:
        for kind in kinds:
            for step, ours in enumerate(curve(kind, overrides, 2)):
                for value, expected, limit in zip(ours, one[kind][step], limits, strict=True):
                    assert math.isclose(value, expected, rel_tol=limit), (overrides, kind, step)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    one = {kind: curve(kind, [], 1) for kind in (*KINDS, "bf16")}
    assert one["fp8_tensorwise"] != one["bf16"]
    assert one["fp8_tensorwise"][-1][0] < 0.95 * one["fp8_tensorwise"][0][0]
    run_ranks(on_two, 2, tmp_path, one, limit=120)
