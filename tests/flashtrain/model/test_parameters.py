from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from flashtrain.compose import CONFIGS, check_position, resolve_model
from flashtrain.config import Mlp, ModelConfig, Norm, PositionConfig, PositionKind, Target
from flashtrain.model.gpt import GPT, n_parameters
from tests.flashtrain.model.test_gpt import tiny

GPT2 = PositionConfig(PositionKind.learned, [Target.embedding])
# published counts; GPT-2's hold with its 47 rows of padded vocabulary counted in
PUBLISHED = {
    "gpt2_124m": 124_439_808 + 47 * 768,
    "gpt2_350m": 354_823_168 + 47 * 1024,
    "gpt2_774m": 774_030_080 + 47 * 1280,
    "gpt2_1.5b": 1_557_611_200 + 47 * 1600,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
}


def preset(schema: type, path: Path) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def counted(model: ModelConfig, position: PositionConfig, max_length: int) -> int:
    with torch.device("meta"):
        gpt = GPT(model, position, max_length)
    return sum(parameter.numel() for parameter in gpt.parameters())


@pytest.mark.parametrize("name", presets("model"))
def test_the_formula_counts_every_preset(name: str) -> None:
    model = preset(ModelConfig, CONFIGS / "model" / f"{name}.yaml")
    model.vocabulary = model.vocabulary or 4096
    model = resolve_model(model)
    position = GPT2 if name.startswith("gpt2") else PositionConfig()
    assert n_parameters(model, position, 1024) == counted(model, position, 1024)
    if name in PUBLISHED:
        assert n_parameters(model, position, 1024) == PUBLISHED[name]


@pytest.mark.parametrize("mlp", Mlp)
@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_formula_counts_every_option(mlp: Mlp, norm: Norm, bias: bool, qk_norm: bool) -> None:
    for tied in (False, True):
        model = tiny(
            mlp=mlp,
            norm=norm,
            bias=bias,
            qk_norm=qk_norm,
            tied_head=tied,
            n_kv_heads=2,
            head_size=6,
        )
        for kind in PositionKind:
            position = PositionConfig(kind)
            assert n_parameters(model, position, 24) == counted(model, position, 24)


@pytest.mark.parametrize("name", presets("position"))
def test_every_position_preset_fits_a_model(name: str) -> None:
    position = preset(PositionConfig, CONFIGS / "position" / f"{name}.yaml")
    check_position(tiny(), position)
    GPT(tiny(), position, max_length=16)
