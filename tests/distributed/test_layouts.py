"""Promises 1 and 2: the loss depends neither on the layout nor on an interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashtrain import hooks
from flashtrain.compose import from_dict, load
from flashtrain.config import to_dict
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.source import prepare_source
from flashtrain.train import train
from tests.harness import run_ranks

STEPS = 20
OVERRIDES = [
    "experiment=null", "model=gpt_tiny", "model.n_layers=2", "model.n_heads=4", "model.d_model=32",
    "data=shards", "data.sequence_length=16", "data.batch_size=8",
    "precision=fp32", f"trainer.steps={STEPS}", "trainer.log_every=1", "trainer.evaluate_every=10",
    "trainer.evaluate_sequences=8", "trainer.sample_every=1000", "schedule.warmup_steps=5",
    "optimizer.lr=1e-2", "tracking=quiet", "checkpoint.every=6", "trainer.compile=false",
]  # fmt: skip


class Interrupted(Exception):
    """Stands for a kill: nothing after it runs."""


def check_train(tree: dict[str, object], kill_after: int | None) -> None:
    if kill_after is not None:
        save = hooks.Save.after_step

        def save_then_die(self: hooks.Save, step: hooks.Step) -> None:
            if step.number == kill_after:
                raise Interrupted
            save(self, step)

        hooks.Save.after_step = save_then_die  # type: ignore[method-assign]
    config = from_dict(tree)
    try:
        train(config, torch.device("cpu"))
    except Interrupted:
        assert kill_after is not None


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level shards of a text with something to learn."""
    folder = tmp_path_factory.mktemp("tokens")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    order = np.random.default_rng(0).integers(len(words), size=4000)
    lines = [" ".join(words[i] for i in order[at : at + 8]) for at in range(0, len(order), 8)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    prepare([folder / "text.txt"], folder / "shards", Recipe("bytes"))
    return folder / "shards"


def run(
    folder: Path, tokens: Path, layout: list[str], world: int, kill_after: int | None = None
) -> None:
    folder.mkdir(exist_ok=True)
    overrides = [*OVERRIDES, *layout, f"data.path={tokens}", f"run_dir={folder}/run"]
    config = prepare_source(load(overrides, world), world)
    run_ranks(check_train, world, folder, to_dict(config), kill_after)


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step; a step logged twice would be lost rows or a broken cut at resume."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert len({line["step"] for line in trained}) == len(trained)
    return {int(line["step"]): line for line in trained}


def losses(folder: Path) -> list[float]:
    table = rows(folder)
    return [table[step]["train/loss"] for step in range(1, STEPS + 1)]


LAYOUTS = {
    "tensor2": (["parallel.tensor=2", "data.micro_batch_size=4"], 2),
    "data2": (["parallel.tensor=1", "data.micro_batch_size=2"], 2),
    "tensor2_data2": (["parallel.tensor=2", "data.micro_batch_size=4"], 4),
    "context2_ring": (
        ["parallel=context2", "parallel.context_kind=ring", "data.micro_batch_size=4"],
        2,
    ),
    "pipeline2": (["parallel=pipeline2", "data.micro_batch_size=2"], 2),
    "tensor2_shard2": (["parallel=fsdp", "parallel.tensor=2", "data.micro_batch_size=2"], 4),
}
ONE = ["parallel.tensor=1", "data.micro_batch_size=8"]


@pytest.fixture(scope="module")
def dense(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    run(folder, tokens, ONE, 1)
    return folder


def test_loss_falls(dense: Path) -> None:
    curve = losses(dense)
    assert curve[-1] < curve[0] - 0.05, curve


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_loss_and_gradient_norm_of_one_process(
    name: str, dense: Path, tokens: Path, tmp_path: Path
) -> None:
    layout, world = LAYOUTS[name]
    run(tmp_path, tokens, layout, world)
    np.testing.assert_allclose(losses(tmp_path), losses(dense), rtol=1e-5)
    ours, theirs = rows(tmp_path), rows(dense)
    for step in (1, STEPS):
        assert ours[step]["train/grad_norm"] == pytest.approx(
            theirs[step]["train/grad_norm"], rel=2e-4
        )


@pytest.mark.parametrize("name", ["tensor2", "data2"])
def test_a_killed_run_goes_on_bit_for_bit(name: str, tokens: Path, tmp_path: Path) -> None:
    layout, world = LAYOUTS[name]
    run(tmp_path / "whole", tokens, layout, world)
    run(tmp_path / "killed", tokens, layout, world, kill_after=12)
    # step 12's own checkpoint was never written: the newest is step 6
    assert sorted(p.name for p in (tmp_path / "killed/run/checkpoints").iterdir()) == [
        "step-00000006"
    ]
    run(tmp_path / "killed", tokens, layout, world)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_run_goes_on_with_another_layout(dense: Path, tokens: Path, tmp_path: Path) -> None:
    run(tmp_path, tokens, *LAYOUTS["tensor2_data2"], kill_after=12)
    run(tmp_path, tokens, *LAYOUTS["context2_ring"], kill_after=18)
    run(tmp_path, tokens, *LAYOUTS["pipeline2"], kill_after=20)
    run(tmp_path, tokens, ONE, 1)
    np.testing.assert_allclose(losses(tmp_path), losses(dense), rtol=1e-5)
