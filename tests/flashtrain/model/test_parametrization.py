"""muP: what it changes and by how much; that it does what it is for: test_coordinate_check.py."""

import math

import pytest
import torch
from torch import nn

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.optim.adamw import build_adamw
from flashtrain.parallel.mesh import SINGLE

CPU = torch.device("cpu")
CASE = [
    "experiment=null", "model=gpt_tiny", "model.n_layers=2", "data=random", "precision=fp32",
    "model.vocabulary=512", "data.sequence_length=16", "data.batch_size=2", "parallel=data",
    "data.micro_batch_size=2",
]  # fmt: skip
MUP = ["model.parametrization=mup", "model.base_width=128"]
WIDE = ["model.d_model=512", "model.n_heads=16"]


def config(*overrides: str) -> Config:
    return load([*CASE, *overrides])


def test_at_the_base_width_both_are_the_same_bit_for_bit() -> None:
    standard = build_model(config(), SINGLE, CPU)
    mup = build_model(config(*MUP), SINGLE, CPU)
    for (name, ours), theirs in zip(mup.named_parameters(), standard.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = torch.arange(16)[None]
    assert torch.equal(mup(tokens), standard(tokens))


def test_hidden_matrices_start_smaller_and_learn_slower_by_the_width() -> None:
    settings = config(*MUP, *WIDE, "model.tied_head=false", "model.bias=true")
    standard = build_model(config(*WIDE, "model.tied_head=false", "model.bias=true"), SINGLE, CPU)
    model = build_model(settings, SINGLE, CPU)
    optimizer = build_adamw(dict(model.named_parameters()), settings.optimizer, settings.model)
    ratios = {id(p): g["lr_ratio"] for g in optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    hidden = {"qkv", "out", "up", "down"}
    for (name, ours), theirs in zip(model.named_parameters(), standard.parameters(), strict=True):
        is_hidden = name.endswith("weight") and name.split(".")[-2] in hidden
        expected = theirs / 2 if is_hidden else theirs  # sqrt(512 / 128)
        torch.testing.assert_close(ours, expected, msg=name)
        assert ratios[id(ours)] == (0.25 if is_hidden else 1.0), name
        if is_hidden:  # a step pulls by rate x decay whatever the width
            assert decays[id(ours)] * ratios[id(ours)] == settings.optimizer.weight_decay


def test_hidden_states_reach_the_head_divided_by_the_width() -> None:
    model = build_model(config(*MUP, *WIDE), SINGLE, CPU)
    seen = {}
    model.norm.register_forward_hook(lambda _m, _x, out: seen.update(norm=out))
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens), seen["norm"] / 4)


@pytest.mark.parametrize("more", ["", "model.qk_norm=true", "position=alibi"])
def test_scores_are_divided_by_the_size_of_a_head(more: str) -> None:
    """Against the same weights with scores over the root of it: queries differ by a half."""
    extra = [*([more] if more else []), "model.n_heads=4", "model.d_model=512"]
    here = build_model(config(*MUP, *extra, "model.base_head_size=32"), SINGLE, CPU)
    there = build_model(config(*MUP, *extra), SINGLE, CPU)  # heads of 128 are its base
    x = torch.randn(1, 16, 512)
    position = here.position(16, CPU, None)
    q, k, v = here.blocks[0].attention._heads(x, position)
    others = there.blocks[0].attention._heads(x, position)
    torch.testing.assert_close(q, others[0] * math.sqrt(32 / 128))
    assert torch.equal(k, others[1])
    assert torch.equal(v, others[2])


def test_groups_without_members_are_left_out() -> None:
    only = {"blocks.0.mlp.up.weight": nn.Parameter(torch.ones(2, 2))}
    settings = config()
    optimizer = build_adamw(only, settings.optimizer, settings.model)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == settings.optimizer.weight_decay


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.parametrization=mup"], "base_width=None.*mup needs the width"),
        (["model.base_width=64"], "parametrization=standard with model.base_width=64"),
        (["model.base_head_size=64"], "base_head_size=64 is for model.parametrization=mup"),
        ([*MUP, "model.base_width=0"], "base_width=0 must be a number above 0"),
    ],
)
def test_half_a_parametrization_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(*overrides)
