"""Degrees that fill in and degrees that are refused; sizes are held to them in tests/configs."""

import pytest

from flashtrain.compose import load
from flashtrain.config import ConfigError, EngineKind, ParallelConfig
from flashtrain.layout import describe_layout, overlap_of, resolve_parallel

SMALL = [
    "experiment=null", "data=random", "model.vocabulary=64", "data.batch_size=32",
    "data.micro_batch_size=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "world", "degrees"),
    [
        ("parallel=data", 4, (4, 1, 1)),
        ("parallel=tensor2", 8, (4, 1, 2)),
        ("parallel=fsdp", 4, (1, 4, 1)),
        ("parallel=fsdp parallel.tensor=2", 8, (1, 4, 2)),
        ("parallel=hsdp", 16, (2, 8, 1)),
        ("parallel=hsdp parallel.shard=2 parallel.tensor=2", 16, (4, 2, 2)),
        ("parallel=fsdp parallel.replicate=2", 8, (2, 4, 1)),
        ("parallel.shard=2", 2, (1, 2, 1)),  # no room is left for the two tensor ranks of `auto`
        ("parallel.shard=2", 8, (2, 2, 2)),
        ("engine=deepspeed parallel=data", 4, (1, 4, 1)),
        ("engine=deepspeed parallel=zero2 parallel.tensor=2", 4, (1, 2, 2)),
    ],
)
def test_free_degrees_take_what_is_left(
    line: str, world: int, degrees: tuple[int, int, int]
) -> None:
    parallel = load([*SMALL, *line.split(" ")], world).parallel
    assert (parallel.replicate, parallel.shard, parallel.tensor) == degrees


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("parallel.replicate=2 parallel.shard=2 parallel.tensor=1", "= 4 is not the 8 processes"),
        ("parallel.shard=3 parallel.tensor=2", "= 6 is not the 8 processes"),
        ("parallel=fsdp parallel.replicate=null", "parallel.shard=null parallel.replicate=null"),
        ("parallel.shard=0", "parallel.shard=0"),
        ("parallel=fsdp parallel.zero=0", "parallel.zero=0 parallel.shard=1 engine=native"),
        ("parallel=fsdp parallel.zero=4", "parallel.zero=4"),
        (
            "parallel=fsdp data.batch_size=12 data.micro_batch_size=1",
            "batch_size=12 8 data-parallel",
        ),
        ("engine=deepspeed parallel.replicate=2", "parallel.replicate=2 engine=native"),
        (
            "engine=deepspeed parallel=fsdp parallel.tensor=4 model.n_kv_heads=2",
            "model.n_kv_heads=2 parallel.tensor=4 engine=native",
        ),
        ("parallel.context=3", "parallel.context=3 8 processes"),
        ("parallel.context=0", "parallel.context=0"),
        (
            "parallel=context2 parallel.tensor=2 data.sequence_length=1020",
            "data.sequence_length=1020 parallel.context=2 parallel.tensor=2 8",
        ),
        (
            "parallel=context2 parallel.context_kind=ulysses model.n_kv_heads=1",
            "model.n_kv_heads=1 parallel.context=2 ulysses gather",
        ),
        (
            "parallel=context2 parallel.context_kind=ulysses parallel.context=8",
            "model.n_heads=4 parallel.context=8 ulysses",
        ),
        (
            "parallel=context2 parallel.context_kind=ring position=alibi",
            "position=alibi ring gather",
        ),
        (
            "parallel=context2 parallel.context_kind=ring data=packed data.path=there",
            "data.packing=best_fit ring gather",
        ),
        ("parallel=context2 engine=deepspeed", "parallel.context=2 engine=native"),
        ("parallel.pipeline=3", "parallel.pipeline=3 8 processes"),
        ("parallel.pipeline=0", "parallel.pipeline=0"),
        ("parallel=pipeline2 parallel.replicate=2", "parallel.pipeline=2 4 8 processes"),
        ("parallel=pipeline2 engine=deepspeed", "parallel.pipeline=2 engine=native"),
        ("parallel=pipeline2 model.n_layers=1", "model.n_layers=1 parallel.pipeline=2 2 stages"),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=interleaved model.n_layers=3",
            "model.n_layers=3 parallel.pipeline=2 4 stages",
        ),
        (
            "parallel=pipeline2 data.micro_batch_size=8",
            "data.batch_size=32 data.micro_batch_size=8 4 data-parallel = 1 parallel.pipeline=2",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=interleaved data.batch_size=12 "
            "data.micro_batch_size=1",
            "data.batch_size=12 = 3 multiple parallel.pipeline=2 interleaved",
        ),
        (
            "parallel=pipeline2 parallel.stages_per_rank=2",
            "parallel.stages_per_rank=2 parallel.pipeline_schedule=1f1b",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=zbv trainer.compile=true",
            "trainer.compile=true zbv 1f1b",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=zero_bubble parallel.shard=2",
            "parallel.shard=2 zero_bubble 1f1b",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=zbv parallel.tensor=2",
            "parallel.tensor=2 zbv 1f1b",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=interleaved parallel.shard=2 "
            "position=learned position.applies_to=[q]",
            "parallel.shard=2 interleaved position=learned 1f1b",
        ),
        (
            "parallel=pipeline2 parallel.pipeline_schedule=interleaved parallel.context=2 "
            "position=learned position.applies_to=[q]",
            "parallel.context=2 interleaved position=learned parallel.shard_context=false 1f1b",
        ),
        (
            "parallel=pipeline2 trainer.check_determinism=5",
            "trainer.check_determinism=5 parallel.pipeline=2 engine=native",
        ),
        ("engine=deepspeed trainer.check_determinism=5", "trainer.check_determinism=5 deepspeed"),
        ("parallel=context2 optimizer=muon", "optimizer=muon parallel.shard_context=false"),
        ("engine=deepspeed trainer.compile=true", "trainer.compile=true parallel.zero=3"),
        ("+engine.deepspeed.zero_optimization.stage=1", "engine.deepspeed engine=deepspeed"),
    ],
)
def test_degrees_that_do_not_fit_are_one_sentence(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load([*SMALL, *line.split(" ")], 8)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert not [word for word in words.split(" ") if word not in sentence], sentence


def test_a_batch_that_ranks_do_not_divide_is_not_blamed_on_a_micro_batch_nobody_set() -> None:
    """The default run on three or six GPUs."""
    for world in (3, 6):
        with pytest.raises(ConfigError, match=r"batch_size=16 .* 3 data-parallel") as refusal:
            load([], world)
        assert "micro_batch_size" not in str(refusal.value)
        assert "multiple of 3" in str(refusal.value) and "--nproc" in str(refusal.value)


def test_context_ranks_are_no_data_ranks() -> None:
    config = load([*SMALL, "parallel=context2"], 8)
    assert (config.parallel.replicate, config.parallel.shard) == (4, 1)
    assert config.data.micro_batch_size == 32 // 4


def test_pipeline_ranks_are_no_data_ranks_and_get_a_micro_batch_each() -> None:
    config = load([*SMALL, "parallel=pipeline2"], 8)
    assert (config.parallel.replicate, config.parallel.shard) == (4, 1)
    assert config.data.micro_batch_size == 32 // 4 // 2
    # three stages share 16 sequences: no five, which does not divide them, but four
    line = ["parallel=pipeline2", "parallel.pipeline=3", "data.batch_size=16"]
    assert load([*SMALL, *line], 3).data.micro_batch_size == 4


@pytest.mark.parametrize(
    ("kind", "stages"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zbv", 2)]
)
def test_a_schedule_has_its_number_of_stages(kind: str, stages: int) -> None:
    schedule = f"parallel.pipeline_schedule={kind}"
    assert load([*SMALL, "parallel=pipeline2", schedule], 8).parallel.stages_per_rank == stages


def test_resolving_again_changes_nothing() -> None:
    for engine in (EngineKind.native, EngineKind.deepspeed):
        once = resolve_parallel(ParallelConfig(tensor=2), engine, 8)
        assert resolve_parallel(once, engine, 8) == once


def test_a_layout_in_words() -> None:
    assert describe_layout(ParallelConfig(tensor=2), 8) == "8 processes: tensor 2 x data 4"
    words = describe_layout(ParallelConfig(tensor=2, shard=2, zero=2), 8)
    assert words == "8 processes: tensor 2 x shard 2 (zero 2) x replicate 2"
    words = describe_layout(ParallelConfig(pipeline=2, tensor=2), 8)
    assert words == "8 processes: pipeline 2 (1f1b) x tensor 2 x data 2"
    words = describe_layout(ParallelConfig(context=2), 8)
    assert words == "8 processes: tensor 1 x context 2 (gather, zero 3) x data 4"


def test_transfers_hide_behind_large_products_and_in_recorded_steps() -> None:
    def overlap(case: str, world: int = 2) -> str:
        config = load([*case.split(), "data=random", "parallel=tensor2"], world)
        return overlap_of(config).name

    wide = "model=llama_8b data.micro_batch_size=2 data.batch_size=2 data.sequence_length=8192"
    assert overlap(f"{wide} trainer.cuda_graph=off") == "auto"
    assert overlap(f"{wide} precision=fp8_tensorwise") == "off"
    small = "model=gpt_1.3b data.micro_batch_size=8 data.batch_size=16 data.sequence_length=2048"
    assert overlap(small) == "auto"
    assert overlap(f"{small} trainer.cuda_graph=off") == "off"
    assert overlap(small, 4) == "off"  # with data ranks no step is recorded
    assert overlap(f"{small} trainer.cuda_graph=off parallel.overlap=on") == "on"
