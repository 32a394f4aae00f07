import re

import pytest
import torch

from flashtrain.build import materialize
from flashtrain.compose import resolve_model
from flashtrain.config import Mlp, ModelConfig, PositionConfig
from flashtrain.model.gpt import GPT
from flashtrain.parallel.layers import ColumnLinear, RowLinear, VocabularyEmbedding
from flashtrain.parallel.mesh import SINGLE, Axis
from flashtrain.parallel.plan import apply_plan, gpt_plan


def fake(size: int, rank: int) -> Axis:
    """A place on an axis that nobody else is on: for arithmetic alone."""
    return Axis(size, rank, None)


def build(model: ModelConfig, position: PositionConfig) -> GPT:
    with torch.device("meta"):
        return GPT(model, position, max_length=8)


def config(**changes: object) -> ModelConfig:
    sizes = dict(n_layers=2, n_heads=4, d_model=16, d_ff=32, vocabulary=24, **changes)
    return resolve_model(ModelConfig(**sizes))  # type: ignore[arg-type]


ROPE = PositionConfig()


def test_an_axis_of_one_leaves_the_model_untouched() -> None:
    model = build(config(), ROPE)
    before = list(model.named_modules())
    apply_plan(model, gpt_plan(config()), SINGLE)
    assert list(model.named_modules()) == before
    assert not any(hasattr(p, "shard") for p in model.parameters())


def test_the_plan_replaces_what_it_names() -> None:
    sizes = config(n_kv_heads=1, mlp=Mlp.swiglu, qk_norm=True)
    model = build(sizes, ROPE)
    apply_plan(model, gpt_plan(sizes), fake(4, 3))
    assert isinstance(model.embedding, VocabularyEmbedding)
    assert isinstance(model.head, ColumnLinear)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        assert attention.first_head == 3
        assert isinstance(attention.qkv, ColumnLinear)
        assert attention.qkv.weight.shape == (4 + 4 + 4, 16)  # a head of 4 for each of q, k, v
        assert isinstance(attention.out, RowLinear)
        assert attention.out.in_features == 4
        assert isinstance(mlp.gate_up, ColumnLinear)
        assert [p.start for p in mlp.gate_up.weight.shard.pieces] == [24, 32 + 24]
        assert isinstance(mlp.down, RowLinear)
    replicated = {name for name, p in model.named_parameters() if hasattr(p, "partial_gradient")}
    marked = {name for name, p in model.named_parameters() if hasattr(p, "tensor_model_parallel")}
    assert replicated == {name for name, _ in model.named_parameters() if "norm" in name}
    assert marked == {name for name, _ in model.named_parameters()} - replicated


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_materialize_keeps_the_tie_and_the_notes(tied: bool, size: int) -> None:
    sizes = config(tied_head=tied)
    model = build(sizes, ROPE)
    apply_plan(model, gpt_plan(sizes), fake(size, 0))
    notes = {name: vars(p).copy() for name, p in model.named_parameters()}
    materialize(model, torch.device("cpu"))
    assert (model.head.weight is model.embedding.weight) == tied
    assert {name: vars(p) for name, p in model.named_parameters()} == notes
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_pattern_that_matches_nothing_is_named() -> None:
    plan = {**gpt_plan(config()), "blocks.*.mlp.gate": lambda module, axis: module}
    with pytest.raises(ValueError, match=re.escape("'blocks.*.mlp.gate' matches no module")):
        apply_plan(build(config(), ROPE), plan, fake(2, 0))


def test_a_parameter_no_entry_covers_is_named() -> None:
    plan = dict(gpt_plan(config()))
    del plan["blocks.*.norm_mlp"]
    with pytest.raises(ValueError, match=re.escape("'blocks.0.norm_mlp.weight'")):
        apply_plan(build(config(), ROPE), plan, fake(2, 0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_heads": 3, "head_size": 4}, "blocks.0.attention: 3 heads do not divide over 2"),
        ({"d_ff": 33}, "blocks.0.mlp.up: 33 rows do not divide over 2"),
        ({"vocabulary": 25}, "embedding: 25 rows do not divide over 2"),
    ],
)
def test_a_size_that_does_not_divide_names_the_module(
    changes: dict[str, int], sentence: str
) -> None:
    sizes = {"n_layers": 1, "n_heads": 4, "d_model": 16, "d_ff": 32, "vocabulary": 24}
    model = resolve_model(ModelConfig(**(sizes | changes)))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        apply_plan(build(model, ROPE), gpt_plan(model), fake(2, 0))
