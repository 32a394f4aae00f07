"""A mixture of packed documents trains alike on one process and on tensor 2 x data 2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashtrain.compose import from_dict, load
from flashtrain.config import to_dict
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.source import prepare_source
from flashtrain.train import train
from tests.harness import run_ranks

STEPS = 6
OVERRIDES = [
    "experiment=null", "model=gpt_tiny", "model.n_layers=2", "model.n_heads=4", "model.d_model=32",
    "position=learned", "position.applies_to=[embedding]",  # cut along the sequence: the hard case
    "data=shards", "data.sequence_length=16", "data.batch_size=8", "data.packing=best_fit",
    "data.mix_changes=[{at_tokens:256,weights:{short:3}}]", "precision=fp32",
    f"trainer.steps={STEPS}", "trainer.log_every=1", "trainer.evaluate_every=3",
    "trainer.evaluate_sequences=8", "trainer.sample_every=1000", "schedule.warmup_steps=2",
    "optimizer.lr=1e-2", "tracking=quiet", "checkpoint.every=3", "trainer.compile=false",
]  # fmt: skip


def check_train(tree: dict[str, object]) -> None:
    train(from_dict(tree), torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level shards of short and of long documents."""
    folder, random = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    named = []
    for name, longest in (("short", 7), ("long", 60)):
        words = ["ab" * int(random.integers(1, longest)) for _ in range(400)]
        lines = [json.dumps({"text": word[int(random.integers(0, 2)) :]}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        prepare([folder / f"{name}.jsonl"], folder / name, Recipe("bytes", validation_share=0.2))
        named.append(f"{name}:{{path:{folder / name},weight:1}}")
    return f"+data.sources={{{','.join(named)}}}"


def rows(folder: Path, sources: str, layout: list[str], world: int) -> list[dict[str, float]]:
    folder.mkdir()
    config = prepare_source(
        load([*OVERRIDES, sources, *layout, f"run_dir={folder}/run"], world), world
    )
    run_ranks(check_train, world, folder, to_dict(config))
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    # a checkpoint's own row is written when it is on disk, in the background: at no fixed place
    return [row for row in map(json.loads, lines) if "checkpoint/write_s" not in row]


def test_a_packed_mixture_trains_alike_on_every_layout(tmp_path: Path, sources: str) -> None:
    one = rows(tmp_path / "one", sources, ["parallel.tensor=1", "data.micro_batch_size=8"], 1)
    four = rows(tmp_path / "four", sources, ["parallel.tensor=2", "data.micro_batch_size=2"], 4)
    assert len(one) == len(four) == STEPS + 2  # and two evaluations
    for ours, theirs in zip(four, one, strict=True):
        for key in ("train/loss", "train/grad_norm", "validation/loss"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5)
    # 256 tokens are 16 sequences of the 48: 8 + 24 are short, 8 + 8 long
    last = [row for row in four if "train/loss" in row][-1]
    assert last["data/tokens/short"] == 32 * 16
    assert last["data/tokens/long"] == 16 * 16
    assert last["data/epochs/long"] > 0
