"""How a model is cut into stages. That they train alike: tests/distributed/test_pipeline.py."""

from collections.abc import Sequence
from itertools import product

import pytest

from flashtrain.build import plan_model
from flashtrain.compose import load
from flashtrain.config import Config, PipelineSchedule
from flashtrain.model.shard import shard_of
from flashtrain.parallel.mesh import SINGLE, Axis
from flashtrain.parallel.pipeline import (
    Stage,
    cut_stages,
    head_in_layers,
    holders,
    split_layers,
    stages_parameters,
)

MODEL = [
    "experiment=null", "data=random", "data.batch_size=12", "data.micro_batch_size=1",
    "model.vocabulary=64", "model.n_layers=6", "model.n_heads=4", "model.d_model=32",
    "parallel.tensor=1", "position=rope",
]  # fmt: skip
KINDS = [kind.name for kind in PipelineSchedule]


def config(ranks: int, *overrides: str) -> Config:
    return load([*MODEL, f"parallel.pipeline={ranks}", *overrides], ranks)


def cut(whole: Config) -> list[list[Stage]]:
    """The stages of every rank."""
    ranks = whole.parallel.pipeline
    return [
        cut_stages(plan_model(whole, SINGLE), Axis(ranks, rank, None), whole.parallel)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("head", [0.0, 0.4, 1.0, 2.5, 20.0])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_split_has_a_faster_slowest_stage(stages: int, head: float) -> None:
    def slowest(sizes: Sequence[int]) -> float:
        return max(*sizes[:-1], sizes[-1] + head, 0)

    for layers in range(stages, 10):
        sizes = split_layers(layers, stages, head)
        every = [
            some for some in product(range(1, layers + 1), repeat=stages) if sum(some) == layers
        ]
        assert tuple(sizes) in every
        assert slowest(sizes) == min(map(slowest, every))


def test_a_stage_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="3 layers leave some of 4 stages"):
        split_layers(3, 4, 0.0)


def test_the_last_stage_of_a_model_with_a_dear_head_has_fewer_layers() -> None:
    small = config(2).model
    head = small.d_model * 64
    block = 12 * small.d_model**2  # q, k, v, out and an MLP of four times the width
    assert head_in_layers(small) == pytest.approx(head / block)
    (first,), (last,) = cut(config(2, "model.vocabulary=1024"))
    assert len(first.model.blocks) > len(last.model.blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [(), ("model.tied_head=false",), ("position=learned",)])
def test_stages_are_the_model_once(kind: str, others: tuple[str, ...]) -> None:
    whole = config(3, f"parallel.pipeline_schedule={kind}", "position.applies_to=[q]", *others)
    model = plan_model(whole, SINGLE)
    ranks = cut(whole)
    assert [stage.number for stages in ranks for stage in stages] == [
        number for rank in range(3) for number, at in enumerate(holders(whole.parallel))
        if at == rank
    ]  # fmt: skip
    found = [dict(stages_parameters(stages)) for stages in ranks]
    assert {name for names in found for name in names} == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        copies = [names[name] for names in found if name in names]
        assert {tuple(copy.shape) for copy in copies} == {tuple(parameter.shape)}
        assert [shard_of(copy).pieces[0].owned for copy in copies] == [True] + [False] * (
            len(copies) - 1
        ), name


def test_in_a_v_one_rank_has_both_ends_and_one_tied_weight() -> None:
    stages = cut(config(2, "parallel.pipeline_schedule=zbv"))
    assert [stage.number for stage in stages[0]] == [0, 3]
    first, last = (stage.model for stage in stages[0])
    assert first.embedding.weight is last.head.weight
    assert not [name for name, _ in stages_parameters(stages[1]) if "embedding" in name]


def test_stages_of_a_rank_have_hooks_of_their_own() -> None:
    one, other = cut(config(2, "parallel.pipeline_schedule=interleaved"))[0]
    one.model.register_forward_pre_hook(lambda module, inputs: None)
    assert not other.model._forward_pre_hooks
