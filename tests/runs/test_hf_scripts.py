"""The scripts that take models in and out, one after the other, as a user would."""

import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.compose import from_dict, load, resolve
from flashtrain.config import (
    Compute,
    Config,
    DataConfig,
    Mlp,
    ModelConfig,
    Norm,
    PositionConfig,
    PositionKind,
    PrecisionConfig,
    RopeScaling,
    RopeType,
    Source,
    TrainerConfig,
    to_dict,
)
from flashtrain.data.tokenizer import train_bpe
from flashtrain.parallel.mesh import SINGLE
from tests.runs.test_single_process import script

TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights as a run folder."""
    folder = tmp_path_factory.mktemp("llama") / "run"
    scaling = RopeScaling(RopeType.llama3, factor=2.0, original_max_position_embeddings=8)
    config = resolve(
        Config(
            model=ModelConfig(
                n_layers=2, n_heads=4, d_model=32, n_kv_heads=2, d_ff=48, vocabulary=384,
                norm=Norm.rmsnorm, mlp=Mlp.swiglu, tied_head=False, norm_eps=1e-6, init_std=0.2,
            ),
            position=PositionConfig(PositionKind.rope, rope_theta=1e4, scaling=scaling),
            data=DataConfig(source=Source.random, sequence_length=16, batch_size=1),
            precision=PrecisionConfig(Compute.fp32),
            trainer=TrainerConfig(steps=1),
        ),
        1,
    )  # fmt: skip
    model = build_model(config, SINGLE, torch.device("cpu"))
    meta = {"config": to_dict(config)}
    checkpoint.save(folder / "checkpoints", 1, checkpoint.collect(model), meta)
    train_bpe([TEXT] * 20, 290).save(folder / "tokenizer.json")
    return folder


def test_out_and_in_again_and_the_command_that_trains_on_fits(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert script("export_hf").main([str(run), "--output", str(out), "--dtype", "float32"]) == 0
    assert "LlamaForCausalLM in float32" in capsys.readouterr().out
    assert script("import_hf").main([str(out), "--output", str(back)]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("scripts/train.sh ")[2]
    overrides = shlex.split(command)
    config = load([*overrides, "trainer.steps=1"])
    imported = from_dict(json.loads((back / "config.json").read_text()))
    assert config.model.weights == str(back)
    config.model.weights = None
    assert config.model == imported.model
    assert config.position == imported.position
    # nothing is overwritten
    assert script("export_hf").main([str(run), "--output", str(out)]) == 2
    assert script("import_hf").main([str(out), "--output", str(back)]) == 2
    assert capsys.readouterr().err.count("is there already") == 2


def test_prompts_stop_strings_and_tensor_ranks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate: ModuleType = script("generate")
    common = [f"run={run}", "prompt=the", "prompt=a lazy", "tokens=30", "seed=5", "end=false"]
    assert generate.main(common) == 0
    whole = capsys.readouterr()
    texts = whole.out.split("──")
    assert "the" in texts[1] and "a lazy" in texts[2]
    assert "tokens/s" in whole.err
    assert "256 bytes a token" in whole.err  # k, v; 2 layers; 2 heads of 8; 4 bytes: fp32
    drawn = texts[2].partition("\na lazy")[2].strip()
    stop = drawn[len(drawn) // 2]
    assert generate.main([*common, f"stop={stop}"]) == 0
    cut = capsys.readouterr().out.split("──")[2].partition("\na lazy")[2]
    assert cut.rstrip("\n") == drawn[: drawn.index(stop)]
    # streamed: the same characters as the batch's second row, which draws with the next seed
    alone = ["prompt=a lazy" if word.startswith("prompt") else word for word in common[1:]]
    alone = [f"run={run}", *dict.fromkeys(alone), "seed=6"]
    assert generate.main(alone) == 0
    assert capsys.readouterr().out.strip() == "a lazy" + drawn


def test_a_folder_that_is_no_model_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("import_hf").main([str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert script("export_hf").main([str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "config.json" in errors[0]
    assert "no checkpoint" in errors[1]
