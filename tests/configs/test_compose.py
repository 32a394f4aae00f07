"""Every config that ships composes, in the order of rank that configs/train.yaml promises."""

from pathlib import Path

import pytest

from flashtrain.compose import CONFIGS, fingerprint, from_dict, load
from flashtrain.config import Config, to_dict

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
CHOICES = sorted(
    (path.parent.name, path.name.removesuffix(".yaml"))
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "launcher", "sweep")
)
# what a choice cannot bring by itself
NEEDS = {
    ("data", "shards"): ["data.path=tokens"],
    ("data", "packed"): ["data.path=tokens"],
    ("data", "remote"): ["data.path=s3://bucket/tokens", "data.cache_dir=cache"],
    ("data", "mixture"): ["+data.sources={web:{path:a,weight:7},code:{path:b}}"],
    ("data", "random"): ["model.vocabulary=512"],
    ("model", "gpt2_1.5b"): ["parallel=data"],  # 25 heads
    ("parallel", "tensor8"): ["model.n_heads=8"],  # gpt_tiny has 4
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    config = load([f"experiment={experiment}", "data.path=tokens"], world_size=8)
    assert config.name == experiment
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    config = load([f"{group}={choice}", *NEEDS.get((group, choice), [])], world_size=8)
    assert isinstance(config, Config)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_default_runs_on_any_usual_number_of_processes(world_size: int) -> None:
    config = load([], world_size)
    assert config.name == "shakespeare"
    assert config.parallel.tensor == (1 if world_size == 1 else 2)


def test_experiments_beat_groups_and_the_command_line_beats_experiments() -> None:
    assert load(["experiment=null"]).precision.compute.name == "bf16"
    assert load([]).precision.compute.name == "fp32"
    assert load(["precision=bf16"]).precision.compute.name == "bf16"
    assert load(["experiment=position_none"]).position.kind.name == "none"
    assert load(["experiment=position_none", "position=alibi"]).position.kind.name == "alibi"
    gpt2 = ["experiment=gpt2_350m", "data.path=tokens"]
    assert load(gpt2).trainer.steps == 600_000
    assert load([*gpt2, "trainer.steps=3"]).trainer.steps == 3


def test_position_experiments_differ_in_position_and_name_alone() -> None:
    base = to_dict(load(["experiment=shakespeare"]))
    for kind in ("learned", "sinusoidal", "rope", "alibi", "none"):
        tree = to_dict(load([f"experiment=position_{kind}"]))
        assert tree["position"]["kind"] == kind
        assert {key for key in base if tree[key] != base[key]} <= {"name", "run_dir", "position"}


def test_no_config_names_a_python_object() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


def test_the_fingerprint_follows_the_numbers_and_not_the_layout() -> None:
    base = fingerprint(load([], 4))
    for same in (
        *("parallel=data", "data.micro_batch_size=2", "tracking=quiet", "attention=torch"),
        "loss.fused=false",
    ):
        assert fingerprint(load([same], 4)) == base, same
    for other in (
        *("optimizer.lr=1e-5", "seed=1", "model.n_layers=3", "position=alibi"),
        "loss.z_loss=1e-4",
    ):
        assert fingerprint(load([other], 4)) != base, other


def test_composition_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load([])
    assert not list(tmp_path.iterdir())
