"""The rules of a layout: degrees that multiply to the world, sizes that they divide."""

import dataclasses
import itertools

from flashtrain.config import (
    Config,
    ConfigError,
    ContextKind,
    CudaGraph,
    EngineKind,
    LinearKind,
    OptimizerKind,
    Overlap,
    Packing,
    ParallelConfig,
    PipelineSchedule,
    PositionKind,
    Recompute,
)

# tokens of a micro-batch x d_model from which transfers run behind products where the host launches
# every kernel: their pieces take it 9 to 12 ms a layer and step (H200, 2026-11-27, 16384 tokens,
# tokens/s per GPU): at width 2048 37.0k on against 51.7k off on two GPUs and 14.1k against 27.3k on
# four; at 4096 41.0k and 35.0k on
WORTH_HIDING = 16384 * 4096
# rows of queries, over batch and heads, of the smallest launches of parallel/gathered.py: two
# rounds of 132 multiprocessors with 128 rows. With fewer, a last round that leaves some of them
# idle weighs too much against the transfer that the launch hides
ENOUGH_ROWS = 2**15


def overlap_of(config: Config) -> Overlap:
    """What `parallel.overlap` means for this model: auto is off where products are too small.

    Off with fp8 layers too, whose products wait for their transfers. In steps that are CUDA graphs
    nothing is too small: on beside off, in tokens/s per GPU of two H200 (2026-11-27), 408.0k and
    381.9k for gpt2_124m, 147.1k and 136.7k for 350m, 58.4k and 52.4k for 1.3b. `config` is
    resolved.
    """
    data, wanted = config.data, config.parallel.overlap
    if config.precision.linear is not LinearKind.compute:
        return Overlap.off
    assert data.micro_batch_size is not None
    tokens = data.micro_batch_size * data.sequence_length // config.parallel.context
    small = tokens * config.model.d_model < WORTH_HIDING
    slow = small and not records(config)
    return Overlap.off if wanted is Overlap.auto and slow else wanted


def records(config: Config) -> bool:
    """Whether `trainer.cuda_graph` makes steps CUDA graphs, on GPUs; `config` is resolved.

    auto: on one GPU, and on tensor ranks or data ranks alone. Two H200 (2026-11-27), recorded and
    step by step, in tokens/s per GPU: data ranks of gpt2_124m 563k and 538k; tensor ranks of
    gpt_1.3b in fp8 62.0k and 45.8k, without overlap as fast either way. Not what no GPU has
    recorded yet: both kinds of ranks together, PyTorch's fused products.
    """
    wanted, parallel = config.trainer.cuda_graph, config.parallel
    if wanted is CudaGraph.off or no_graphs(config) is not None:
        return False
    tried = parallel.replicate == 1 or parallel.tensor == 1
    return wanted is CudaGraph.on or (tried and parallel.overlap is not Overlap.fused)


def whole_micro_batch(batch: int, parallel: ParallelConfig) -> int:
    """Sequences of a micro-batch where none is asked for: a data rank's share of the batch, or its
    largest part of which every pipeline rank has one; 1 where there is none. `parallel` is
    resolved."""
    each = batch // data_ranks(parallel)
    most = each // parallel.pipeline
    return next((size for size in range(most, 1, -1) if each % size == 0), 1)


def resolve_parallel(
    parallel: ParallelConfig, engine: EngineKind, world_size: int
) -> ParallelConfig:
    """Every degree filled in; refuses those whose product is not the number of processes."""
    tensor, shard, replicate = parallel.tensor, parallel.shard, parallel.replicate
    context, pipeline = parallel.context, parallel.pipeline
    if tensor is None:
        others = context * pipeline * (shard or 1) * (replicate or 1)
        tensor = 2 if world_size % (2 * others) == 0 else 1
    inner, spoken = tensor * context * pipeline, f"parallel.tensor={tensor}"
    if context > 1:
        spoken = f"parallel.context={context} x {spoken}"
    if pipeline > 1:
        spoken = f"parallel.pipeline={pipeline} x {spoken}"
    need(
        world_size % inner == 0,
        f"{spoken} does not divide the {world_size} processes of this run",
    )
    if engine is EngineKind.deepspeed and shard == 1:
        shard, replicate = None, replicate or 1  # its ZeRO always shards, over all data ranks
    if shard is None:
        need(
            replicate is not None,
            "parallel.shard=null and parallel.replicate=null: one of them takes all processes that "
            "are left, so the other must be a number",
        )
        assert replicate is not None
        shard = max(1, world_size // (inner * replicate))
    if replicate is None:
        replicate = max(1, world_size // (inner * shard))
    product = replicate * shard * inner
    need(
        product == world_size,
        f"parallel.replicate={replicate} x parallel.shard={shard} x {spoken} = "
        f"{product} is not the {world_size} processes of this run: change a degree, or leave "
        "parallel.replicate or parallel.shard null to take what is left",
    )
    need(
        parallel.zero in (1, 2, 3),
        f"parallel.zero={parallel.zero} must be 1 (weights and optimizer state are sharded), 2 "
        "(gradients too) or 3 (gathered weights too); for none of them use parallel.shard=1 with "
        "engine=native: DeepSpeed's stage 0 clips bf16 gradients by a wrong norm",
    )
    stages = parallel.stages_per_rank
    if stages is None:
        several = parallel.pipeline_schedule in (PipelineSchedule.interleaved, PipelineSchedule.zbv)
        stages = 2 if several else 1
    return dataclasses.replace(
        parallel, tensor=tensor, shard=shard, replicate=replicate, stages_per_rank=stages
    )


def data_ranks(parallel: ParallelConfig) -> int:
    """How many ranks see different samples; `parallel` is resolved."""
    assert parallel.shard is not None and parallel.replicate is not None
    return parallel.shard * parallel.replicate


def describe_layout(parallel: ParallelConfig, world_size: int) -> str:
    """As a run's first lines show it: "8 processes: tensor 2 x shard 2 (zero 3) x replicate 2"."""
    tensor, shard, context = parallel.tensor or 1, parallel.shard or 1, parallel.context
    replicate = world_size // (tensor * context * shard * parallel.pipeline)
    inner = f"tensor {tensor}"
    if parallel.pipeline > 1:
        inner = f"pipeline {parallel.pipeline} ({parallel.pipeline_schedule.name}) x {inner}"
    if context > 1:
        zero = f", zero {parallel.zero}" if parallel.shard_context else ""
        inner += f" x context {context} ({parallel.context_kind.name}{zero})"
    if shard == 1:
        return f"{world_size} processes: {inner} x data {replicate}"
    copies = f" x replicate {replicate}" if replicate > 1 else ""
    return f"{world_size} processes: {inner} x shard {shard} (zero {parallel.zero}){copies}"


def check_layout(config: Config, world_size: int) -> None:
    """Refuse sizes that the degrees do not divide, naming both numbers. `config` is resolved."""
    model, data, tensor = config.model, config.data, config.parallel.tensor
    assert tensor is not None and model.n_kv_heads is not None and model.d_ff is not None
    assert data.micro_batch_size is not None
    ranks = data_ranks(config.parallel)
    need(
        model.n_heads % tensor == 0,
        f"model.n_heads={model.n_heads} is not divisible by parallel.tensor={tensor}",
    )
    need(
        model.n_kv_heads % tensor == 0 or tensor % model.n_kv_heads == 0,
        f"model.n_kv_heads={model.n_kv_heads} and parallel.tensor={tensor}: one must divide "
        "the other, so that ranks hold or share whole key/value heads",
    )
    for key, value in (
        ("model.d_ff", model.d_ff),
        ("data.sequence_length", data.sequence_length),
        ("model.vocabulary", model.vocabulary),
    ):
        need(
            value is None or value % tensor == 0,
            f"{key}={value} is not divisible by parallel.tensor={tensor}",
        )
    need(
        data.batch_size % ranks == 0,  # said first: the micro-batch may be what was made of it
        f"data.batch_size={data.batch_size} is not divisible by {ranks} data-parallel ranks: take "
        f"a multiple of {ranks}, or another number of processes (--nproc)",
    )
    per_pass = data.micro_batch_size * ranks
    need(
        data.batch_size % per_pass == 0,
        f"data.batch_size={data.batch_size} is not divisible by data.micro_batch_size="
        f"{data.micro_batch_size} x {ranks} data-parallel ranks = {per_pass}",
    )
    need(
        config.trainer.evaluate_sequences % ranks == 0,
        f"trainer.evaluate_sequences={config.trainer.evaluate_sequences} is not divisible by "
        f"{ranks} data-parallel ranks",
    )
    check_savings(config)
    check_steps(config)
    if config.parallel.context > 1:
        check_context(config)
    need(
        config.optimizer.name is not OptimizerKind.muon
        or (config.parallel.shard == 1 and config.engine.name is EngineKind.native),
        "optimizer=muon makes whole matrices orthogonal and takes no parts of their rows: "
        f"parallel.shard={config.parallel.shard} with engine={config.engine.name.name} must be 1 "
        "with native, or take optimizer=adamw",
    )
    if config.engine.name is EngineKind.deepspeed:
        check_deepspeed(config)
    need(
        config.engine.name is EngineKind.deepspeed or not config.engine.deepspeed,
        f"engine.deepspeed={config.engine.deepspeed} is for engine=deepspeed; the native engine "
        "has no use for it",
    )


def check_savings(config: Config) -> None:
    """What chunked MLPs and inputs kept on the host do not go with."""
    trainer, recompute = config.trainer, f"trainer.recompute={config.trainer.recompute.name}"
    chunks = f"trainer.mlp_chunks={trainer.mlp_chunks}"
    need(trainer.mlp_chunks >= 1, f"{chunks} must be at least 1, which is the MLP as a whole")
    need(
        trainer.mlp_chunks == 1 or trainer.recompute is not Recompute.selective,
        f"{chunks} with {recompute}, which keeps products of the MLP that chunks recompute: use "
        "trainer.recompute=none or full",
    )
    need(
        not trainer.offload_activations or trainer.recompute is Recompute.full,
        f"trainer.offload_activations=true keeps blocks' inputs on the host, and {recompute} keeps "
        "more than those: use trainer.recompute=full",
    )
    keep = f"trainer.offload_keep={trainer.offload_keep}"
    need(trainer.offload_keep >= 1, f"{keep} must be at least 1: backward needs the last at once")
    need(
        trainer.offload_keep == 1 or trainer.offload_activations,
        f"{keep} is for trainer.offload_activations=true",
    )
    need(
        (config.engine.name is EngineKind.native and config.parallel.pipeline == 1)
        or not (trainer.mlp_chunks > 1 or trainer.offload_activations),
        f"{chunks} and trainer.offload_activations={trainer.offload_activations} are for "
        f"engine=native with parallel.pipeline=1, not engine={config.engine.name.name} with "
        f"parallel.pipeline={config.parallel.pipeline}",
    )


def check_steps(config: Config) -> None:
    """Which engines can record a step, or repeat one."""
    every = config.trainer.check_determinism
    need(
        every is None
        or (config.engine.name is EngineKind.native and config.parallel.pipeline == 1),
        f"trainer.check_determinism={every} needs engine=native with parallel.pipeline=1, not "
        f"engine={config.engine.name.name} with parallel.pipeline={config.parallel.pipeline}: only "
        "there can a step be repeated",
    )
    reason = no_graphs(config) if config.trainer.cuda_graph is CudaGraph.on else None
    need(reason is None, f"trainer.cuda_graph=on: {reason}; take auto or off")


def no_graphs(config: Config) -> str | None:
    """Why steps of this config cannot be CUDA graphs; None where they can. `config` is resolved."""
    parallel, trainer = config.parallel, config.trainer
    others = parallel.pipeline * parallel.context * (parallel.shard or 1)
    if config.engine.name is not EngineKind.native:
        return f"engine={config.engine.name.name} runs its own steps"
    if others > 1:
        return (
            "of processes that talk to each other in a step those with parallel.tensor and "
            f"parallel.replicate are recorded, and here {others} share weights, a sequence or the "
            "layers"
        )
    if trainer.offload_activations:
        return "trainer.offload_activations=true moves activations as the host says"
    if trainer.nvtx:
        return "trainer.nvtx=true names operations, which a graph has not"
    return None


def check_sequence(tokens: int, parallel: ParallelConfig, key: str) -> None:
    """Refuse a length that context and tensor ranks do not divide; `key` is what set it."""
    assert parallel.tensor is not None
    pieces = 2 * parallel.context * parallel.tensor
    need(
        parallel.context == 1 or tokens % pieces == 0,
        f"{key}={tokens} is not divisible by 2 x parallel.context={parallel.context} x "
        f"parallel.tensor={parallel.tensor} = {pieces}",
    )


def check_context(config: Config) -> None:
    """What each form of attention over parts of a sequence cannot do."""
    parallel, model = config.parallel, config.model
    assert parallel.tensor is not None and model.n_kv_heads is not None
    kind = f"parallel.context_kind={parallel.context_kind.name}"
    check_sequence(config.data.sequence_length, parallel, "data.sequence_length")
    need(
        config.engine.name is not EngineKind.deepspeed,
        f"parallel.context={parallel.context} with engine=deepspeed: use engine=native",
    )
    need(
        config.optimizer.name is not OptimizerKind.muon or not parallel.shard_context,
        f"optimizer=muon with parallel.context={parallel.context} would get parts of matrices: "
        "set parallel.shard_context=false, or take optimizer=adamw",
    )
    if parallel.context_kind is ContextKind.ulysses:
        for key, heads in (
            ("model.n_heads", model.n_heads),
            ("model.n_kv_heads", model.n_kv_heads),
        ):
            need(
                heads % (parallel.tensor * parallel.context) == 0,
                f"{key}={heads} is not divisible by parallel.tensor={parallel.tensor} x "
                f"parallel.context={parallel.context}, as {kind} needs: use gather or ring",
            )
    if parallel.context_kind is ContextKind.ring:
        need(
            config.position.kind is not PositionKind.alibi,
            f"position=alibi with {kind}, which is for plain causal attention: use gather or "
            "ulysses",
        )
        need(
            config.data.packing is Packing.none,
            f"data.packing={config.data.packing.name} with {kind}, which is for plain causal "
            "attention: use gather or ulysses",
        )


def head_groups(batch: int, length: int, heads: int, kv_heads: int) -> list[tuple[slice, slice]]:
    """Query heads and key/value heads of each group in parallel/gathered.py, for chunks of `length`
    tokens.

    The first and the last, whose transfers nothing hides, have a quarter of the heads and the one
    between them half; two halves or all at once where that would leave a launch too little.
    """
    pieces = max(1, min(4, kv_heads, batch * length * heads // ENOUGH_ROWS))
    edge = kv_heads // pieces
    inner = [edge, kv_heads - edge] if pieces > 2 else [edge] if pieces == 2 else []
    bounds = [0, *inner, kv_heads]
    ratio = heads // kv_heads
    return [
        (slice(begin * ratio, end * ratio), slice(begin, end))
        for begin, end in itertools.pairwise(bounds)
    ]


def check_deepspeed(config: Config) -> None:
    """What DeepSpeed's ZeRO cannot do over our tensor parallelism."""
    parallel, model = config.parallel, config.model
    assert parallel.tensor is not None and model.n_kv_heads is not None
    need(
        parallel.replicate == 1,
        f"parallel.replicate={parallel.replicate} with engine=deepspeed: its ZeRO shards over all "
        "data ranks, so set parallel.replicate=1 parallel.shard=null, or engine=native",
    )
    need(
        model.n_kv_heads >= parallel.tensor,
        f"model.n_kv_heads={model.n_kv_heads} with parallel.tensor={parallel.tensor} and "
        "engine=deepspeed: ranks would share key/value heads, which its gradient norm counts once "
        "each; lower parallel.tensor or use engine=native",
    )
    need(
        not (parallel.zero == 3 and config.trainer.compile),
        "trainer.compile=true with engine=deepspeed and parallel.zero=3, whose hooks inside every "
        "layer torch.compile cannot trace: leave it null, or use parallel.zero=2 or engine=native",
    )


def need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)
