"""What a pipeline asks of a config. The stages themselves: flashtrain/parallel/pipeline.py."""

from flashtrain.config import (
    Config,
    EngineKind,
    LinearKind,
    ParallelConfig,
    PipelineSchedule,
    PositionConfig,
    PositionKind,
    Target,
)
from flashtrain.layout import data_ranks, need

# schedules that fill waits with the second half of backward (flashtrain/engine/deferred.py)
SPLIT_BACKWARD = (PipelineSchedule.zero_bubble, PipelineSchedule.zbv)


def check_pipeline(config: Config) -> None:
    """Refuse what a schedule cannot do, and layers and micro-batches that it cannot spread.

    `config` is resolved.
    """
    parallel, data = config.parallel, config.data
    assert parallel.stages_per_rank is not None and data.micro_batch_size is not None
    schedule, per_rank = parallel.pipeline_schedule, parallel.stages_per_rank
    name = f"parallel.pipeline_schedule={schedule.name}"
    need(
        config.engine.name is not EngineKind.deepspeed,
        f"parallel.pipeline={parallel.pipeline} with engine=deepspeed: use engine=native",
    )
    fits = {
        PipelineSchedule["1f1b"]: per_rank == 1,
        PipelineSchedule.interleaved: per_rank >= 2,
        PipelineSchedule.zbv: per_rank == 2,
    }
    need(
        fits.get(schedule, True),
        f"parallel.stages_per_rank={per_rank} with {name}: 1f1b has 1, interleaved 2 or more, zbv "
        "2; leave it null",
    )
    stages = parallel.pipeline * per_rank
    need(
        config.model.n_layers >= stages,
        f"model.n_layers={config.model.n_layers} is less than the parallel.pipeline="
        f"{parallel.pipeline} x {per_rank} = {stages} stages, each of which needs a layer",
    )
    check_micro_batches(data.batch_size, data.micro_batch_size, parallel, "data.batch_size")
    if schedule in SPLIT_BACKWARD:
        check_split_backward(config, name)
    keep = config.precision.keep_blocks
    need(
        keep == 0,
        f"precision.keep_blocks={keep} with parallel.pipeline={parallel.pipeline}: the blocks at "
        "the ends of every stage would be kept, not those of the model; set it to 0",
    )
    need(
        not cuts_weights(parallel) or per_rank == 1 or not has_shared_vectors(config.position),
        f"parallel.shard={parallel.shard} parallel.context={parallel.context} with {name} and "
        "position=learned on heads: stages of a rank would share a table that is cut; set "
        "parallel.shard=1 and parallel.shard_context=false, or use "
        "parallel.pipeline_schedule=1f1b",
    )


def check_micro_batches(
    batch_size: int, micro_batch_size: int, parallel: ParallelConfig, key: str
) -> None:
    """Refuse a batch that leaves pipeline ranks without work; `key` is what set it."""
    count = batch_size // (micro_batch_size * data_ranks(parallel))
    whole_rounds = parallel.pipeline_schedule in (
        PipelineSchedule.interleaved,
        PipelineSchedule.zero_bubble,
    )
    what = "a multiple of" if whole_rounds else "at least"
    need(
        count >= parallel.pipeline and not (whole_rounds and count % parallel.pipeline),
        f"{key}={batch_size} / data.micro_batch_size={micro_batch_size} / {data_ranks(parallel)} "
        f"data-parallel ranks = {count} micro-batches must be {what} parallel.pipeline="
        f"{parallel.pipeline} with parallel.pipeline_schedule={parallel.pipeline_schedule.name}: "
        "change data.micro_batch_size",
    )


def check_split_backward(config: Config, name: str) -> None:
    """Where the gradients of weights cannot wait (flashtrain/engine/deferred.py)."""
    parallel = config.parallel
    linear = config.precision.linear
    way = "use parallel.pipeline_schedule=1f1b or interleaved"
    need(
        not config.trainer.compile,
        f"trainer.compile=true with {name}: a compiled block has one backward, which cannot be "
        f"split in two; leave it null, or {way}",
    )
    need(
        not cuts_weights(parallel),
        f"parallel.shard={parallel.shard} parallel.context={parallel.context} with {name}: FSDP "
        "reduces gradients in the first half of backward, where those of weights are still to "
        f"come; set parallel.shard=1 and parallel.shard_context=false, or {way}",
    )
    need(
        parallel.tensor == 1,
        f"parallel.tensor={parallel.tensor} with {name}: tensor-parallel layers make gradients of "
        f"weights while they communicate, so none are left for later; {way}",
    )
    need(
        linear is LinearKind.compute,
        f"precision.linear={linear.name} with {name}: fp8 products have a backward of their own; "
        f"{way}",
    )


def cuts_weights(parallel: ParallelConfig) -> bool:
    """Whether ranks keep parts of the same weights: those of `shard`, and context ranks too."""
    return parallel.shard != 1 or (parallel.context > 1 and parallel.shard_context)


def has_shared_vectors(position: PositionConfig) -> bool:
    """Whether all blocks use one table that is trained."""
    return position.kind is PositionKind.learned and Target.embedding not in position.applies_to
