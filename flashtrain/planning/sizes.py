"""A resolved config as the plain numbers that the formulas of this package are made of."""

from dataclasses import dataclass

from flashtrain.config import (
    Compute,
    Config,
    EngineKind,
    LinearKind,
    Mlp,
    ModelConfig,
    Moments,
    Norm,
    OptimizerKind,
    Overlap,
    PipelineSchedule,
    PositionKind,
    Target,
)
from flashtrain.layout import data_ranks, overlap_of


@dataclass(frozen=True)
class Sizes:
    """Dims as in the code: B sequences of T tokens in a micro-batch; n tensor, c context, p
    pipeline, s sharding ranks. Counts of numbers, not bytes, unless a name says so."""

    tokens: int  # of one micro-batch on one rank: B T / c
    length: int  # T
    micro_batches: int  # per step and data rank
    width: int  # d_model
    q: int  # columns of all query heads of this rank
    kv: int  # of its keys, and as many of its values
    hidden: int  # columns between the MLP's products, of this rank
    up: int  # columns of the MLP's first product, of this rank: hidden, twice that for SwiGLU
    words: int  # vocabulary of this rank
    tensor: int
    context: int
    pipeline: int
    shard: int  # ranks that cut the same weights: parallel.shard, times context where that cuts
    replicate: int  # ranks that sum gradients of the same weights
    layers: int  # of this pipeline rank
    block_matrices: int  # weights of one block's products, of this tensor rank
    block_vectors: int  # norms and biases of one block, of this tensor rank
    ends: int  # weights outside blocks of the rank that has most of them
    itemsize: int  # bytes of one activation
    overlap: bool  # tensor ranks' transfers run beside products
    fp8: float  # share of the blocks whose products run in fp8

    @property
    def held(self) -> float:
        """Trained numbers whose fp32 weight, gradient and optimizer state this rank keeps."""
        vectors = self.layers * self.block_vectors  # FSDP leaves them whole
        return (self.layers * self.block_matrices + self.ends) / self.shard + vectors

    @property
    def whole(self) -> int:
        """The same before they are cut over sharding ranks."""
        return self.layers * (self.block_matrices + self.block_vectors) + self.ends


def sizes_of(config: Config) -> Sizes:
    """`config` is resolved for its number of ranks. ValueError for what is not predicted."""
    model, parallel, data = config.model, config.parallel, config.data
    assert parallel.tensor is not None and parallel.shard is not None
    assert parallel.replicate is not None and data.micro_batch_size is not None
    assert model.n_kv_heads is not None and model.head_size is not None
    assert model.d_ff is not None
    if model.vocabulary is None:
        raise ValueError("model.vocabulary must be set: there is no tokenizer to take it from")
    if config.engine.name is not EngineKind.native:
        raise ValueError(
            f"engine={config.engine.name.name} is not predicted: plan with engine=native"
        )
    if parallel.pipeline > 1 and parallel.pipeline_schedule not in (
        PipelineSchedule["1f1b"],
        PipelineSchedule["interleaved"],
    ):
        raise ValueError(
            f"parallel.pipeline_schedule={parallel.pipeline_schedule.name} is not predicted: plan "
            "with 1f1b or interleaved"
        )
    n, pipeline = parallel.tensor, parallel.pipeline
    cut = parallel.context if parallel.shard_context else 1
    width, size = model.d_model, model.head_size
    q = model.n_heads // n * size
    kv = max(1, model.n_kv_heads // n) * size
    hidden = model.d_ff // n
    up = hidden * (2 if model.mlp is Mlp.swiglu else 1)
    table = data.sequence_length * width * (config.position.kind is PositionKind.learned)
    words = model.vocabulary // n
    both_ends = pipeline == 1
    vectors = words * width * (1 if model.tied_head or not both_ends else 2)
    norm = width * (1 + (model.bias and model.norm is Norm.layernorm))
    return Sizes(
        tokens=data.micro_batch_size * data.sequence_length // parallel.context,
        length=data.sequence_length,
        micro_batches=data.batch_size // (data_ranks(parallel) * data.micro_batch_size),
        width=width,
        q=q,
        kv=kv,
        hidden=hidden,
        up=up,
        words=words,
        tensor=n,
        context=parallel.context,
        pipeline=pipeline,
        shard=parallel.shard * cut,
        replicate=parallel.replicate * (parallel.context // cut),
        layers=-(-model.n_layers // pipeline),
        block_matrices=width * (q + 2 * kv) + q * width + width * up + hidden * width,
        block_vectors=2 * norm
        + 2 * size * model.qk_norm
        + model.bias * (q + 2 * kv + up + 2 * width),
        ends=vectors + table + norm,
        itemsize=2 if config.precision.compute is Compute.bf16 else 4,
        overlap=n > 1 and overlap_of(config) is not Overlap.off,
        fp8=_fp8_share(config),
    )


def _fp8_share(config: Config) -> float:
    if config.precision.linear is LinearKind.compute:
        return 0.0
    return max(0.0, 1 - 2 * config.precision.keep_blocks / config.model.n_layers)


def rotated(config: Config, sizes: Sizes) -> dict[Target, int]:
    """Columns of those of q, k and v that something touches between projection and attention."""
    columns = {Target.q: sizes.q, Target.k: sizes.kv, Target.v: sizes.kv}
    touched: set[Target] = set()
    if config.position.kind not in (PositionKind.alibi, PositionKind.none):
        touched = {target for target in config.position.applies_to if target in columns}
    if config.model.qk_norm:
        touched |= {Target.q, Target.k}
    return {target: size for target, size in columns.items() if target in touched}


def moment_bytes(config: Config, sizes: Sizes) -> float:
    """Optimizer state: two moments, fp32 or bf16; for Muon one fp32 of the blocks' matrices."""
    if config.optimizer.name is OptimizerKind.adamw:
        return (8 if config.optimizer.moments is Moments.fp32 else 4) * sizes.held
    matrices = sizes.layers * sizes.block_matrices / sizes.shard
    return 8 * sizes.held - 4 * matrices


def norms_per_block(model: ModelConfig) -> int:
    """Statistics a token that the norms of one block keep: LayerNorm a mean and a deviation."""
    return 4 if model.norm is Norm.layernorm else 2
