"""What is refused before a worker starts, each with one sentence that names the numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtrain.checkpoint import collect, save
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.shards import DataError
from flashtrain.door import admit, bytes_per_parameter, describe_attention
from flashtrain.model.gpt import GPT
from kernels.attention.select import resolve

SMALL = [
    "data=shards", "data.sequence_length=16", "data.batch_size=4", "data.micro_batch_size=null",
    "trainer.evaluate_sequences=4", "tracking.wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    text = "\n\n".join(f"line {n} of a text about nothing in particular" for n in range(400))
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "shards", Recipe("bytes", validation_share=0.2))
    return folder / "shards"


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "shards")
    return tmp_path / "shards"


def admitted(shards: Path, *overrides: str, world: int = 1) -> Config:
    return admit(load([*SMALL, f"data.path={shards}", *overrides], world), world, world)


def test_a_sound_folder_is_admitted_and_gives_the_vocabulary(shards: Path) -> None:
    config = admitted(shards)
    assert config.model.vocabulary == 384  # 257 rounded up to a multiple of 128


def damage_manifest(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def test_more_processes_than_gpus_are_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert admitted(shards, "parallel=tensor2", world=2).parallel.tensor == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    several = load([*SMALL, f"data.path={shards}", "parallel=data"], 4)
    refusal = "^4 processes on this machine, which has 2 GPUs in CUDA_VISIBLE_DEVICES=0,1: each"
    with pytest.raises(ConfigError, match=refusal):
        admit(several, 4, 4)
    assert admit(several, 4, 2).parallel.replicate == 4  # two machines


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "manifest not JSON": (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
    "unknown dtype": (damage_manifest("dtype", "float16"), "float16"),
    "unknown format": (damage_manifest("format", 999), "999"),
    "missing shard": (lambda f: (f / "train-00000.bin").unlink(), "not there"),
    "empty shard": (lambda f: (f / "train-00000.bin").write_bytes(b""), "0 bytes"),
    "truncated shard": (
        lambda f: (f / "train-00000.bin").write_bytes((f / "train-00000.bin").read_bytes()[:-7]),
        "truncated",
    ),
    "missing held-out shard": (lambda f: (f / "validation-00000.bin").unlink(), "not there"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards_are_refused_in_one_line(name: str, shards: Path) -> None:
    damage, word = DAMAGES[name]
    damage(shards)
    with pytest.raises(DataError, match=word) as refusal:
        admitted(shards)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocabulary=256"], ["256", "257"]),
        (["trainer.evaluate_sequences=100000"], ["100000", "held-out"]),
        (["data.sequence_length=100000000"], ["100,000,001"]),
        (["model.word_vectors=/nowhere/vectors.txt"], ["/nowhere/vectors.txt"]),
        (["model.weights=/nowhere/run"], ["/nowhere/run", "import_hf"]),
        ([f"model.word_vectors={__file__}", "model.weights=/"], ["one or the other"]),
        (["checkpoint.resume=/nowhere/step-1"], ["/nowhere/step-1", "manifest.json"]),
        (["model.d_model=1000000", "model.n_heads=10000"], ["GiB", "parallel.tensor"]),
        (["attention=hopper"], ["hopper"]),
    ],
    ids=lambda value: value[0],
)
def test_what_does_not_fit_data_or_machine_is_refused(
    overrides: list[str], words: list[str], shards: Path
) -> None:
    if overrides == ["attention=hopper"]:
        overrides = [*overrides, "model.head_size=6"]  # no GPU's Hopper kernel takes it either
    with pytest.raises((ConfigError, DataError)) as refusal:
        admitted(shards, *overrides)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_the_chosen_attention_is_said(shards: Path) -> None:
    assert describe_attention(admitted(shards, "attention=reference")).startswith("reference")


class Card:
    total_memory = 80 << 30


@pytest.mark.parametrize(
    ("capability", "overrides", "backend"),
    [
        ((9, 0), ["model.head_size=64"], "hopper"),
        ((9, 0), ["model.head_size=64", "position=alibi"], "hopper"),
        ((9, 0), ["model.head_size=48"], "hopper"),
        ((9, 0), ["model.head_size=20"], "triton"),
        ((8, 0), ["model.head_size=64"], "triton"),
        ((9, 0), ["model.head_size=64", "precision=fp32"], "triton"),
    ],
)
def test_on_a_gpu_the_choice_is_known_before_any_of_its_memory_is_touched(
    capability: tuple[int, int],
    overrides: list[str],
    backend: str,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Card)
    resolve.cache_clear()  # its answers are of the machine it first ran on
    config = admitted(shards, "experiment=null", *overrides)
    assert describe_attention(config).startswith(backend)
    resolve.cache_clear()


def test_a_gpu_too_old_for_the_kernels_is_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Card)
    resolve.cache_clear()
    with pytest.raises(ConfigError, match=r"8\.0 or newer, this GPU has 7\.5"):
        admitted(shards, "experiment=null")
    resolve.cache_clear()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel=data"], 16),
        (["parallel=data", "optimizer=muon"], 12),
        (["parallel=fsdp"], 16 / 4),
        (["parallel=zero2"], 16 / 4 + 2),  # and the gathered bf16 weights
        (["parallel=zero1"], 16 / 4 + 2),
        (["parallel=zero1", "data.micro_batch_size=1"], 12 / 4 + 2 + 4),  # and whole gradients
        (["parallel=hsdp", "parallel.shard=2"], 16 / 2),
        (["parallel=context2"], 16 / 2),
        (["parallel=context2", "parallel.shard_context=false"], 16),
        (["engine=deepspeed", "parallel=fsdp"], 12 / 4 + 2 / 4 + 4 / 4),
        (["engine=deepspeed", "parallel=zero1"], 12 / 4 + 2 + 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_memory_of_a_parameter(overrides: list[str], expected: float) -> None:
    line = ["experiment=null", "data=random", "model.vocabulary=64", "data.batch_size=8"]
    line += ["data.micro_batch_size=null", "trainer.evaluate_sequences=4"]
    assert bytes_per_parameter(load([*line, *overrides], 4)) == pytest.approx(expected)


def test_offloaded_optimizer_state_weighs_nothing_on_the_gpu() -> None:
    line = ["experiment=null", "data=random", "model.vocabulary=64", "engine=deepspeed"]
    line += ["+engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    assert bytes_per_parameter(load(line, 1)) == 2 + 4


@pytest.mark.parametrize("key", ["model.weights", "checkpoint.resume"])
def test_weights_of_another_model_are_refused(shards: Path, tmp_path: Path, key: str) -> None:
    config = admitted(shards)
    model = GPT(config.model, config.position, max_length=config.data.sequence_length)
    path = save(tmp_path / "run" / "checkpoints", 4, collect(model), {})
    folder = path if key == "checkpoint.resume" else tmp_path / "run"
    line = [f"{key}={folder}", f"run_dir={tmp_path}/new"]
    admitted(shards, *line)
    for other, told in (
        ("model.d_model=64", rf"{key}: {path} holds .* is \[384, 128\] there and \[384, 64\] here"),
        ("position=gpt2", "position.weight is absent there and .* here; set model"),
        ("model.n_layers=3", "is .* there and absent here"),
    ):
        with pytest.raises(ConfigError, match=told):
            admitted(shards, *line, other)
    (path / "manifest.json").write_text("{}")  # damage is for those that load it to find
    admitted(shards, *line, "model.d_model=64")


def test_an_engine_that_is_not_installed_is_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deepspeed, which is not installed: pip install"):
        admitted(shards, "engine=deepspeed")
