"""What fp8 linear layers and bf16 moments ask of a config.

The layers: flashtrain/model/float8.py; the moments: flashtrain/optim/adamw_kernel.py.
"""

from flashtrain.config import (
    Compute,
    Config,
    EngineKind,
    LinearKind,
    Mlp,
    Moments,
    OptimizerKind,
    Overlap,
    PipelineSchedule,
)
from flashtrain.layout import need

MULTIPLE = 16  # operands of fp8 products have rows of whole 16-byte units
# schedules whose backward is in two halves, with products of its own (engine/deferred.py)
SPLIT_BACKWARD = (PipelineSchedule.zero_bubble, PipelineSchedule.zbv)
LARGEST_BETA = 0.99  # of moments in bf16, whose 8 bits lose smaller moves


def is_fp8(config: Config) -> bool:
    return config.precision.linear is not LinearKind.compute


def check_precision(config: Config) -> None:
    """Refuse fp8 layers that cannot be built; `config` is resolved."""
    precision, data, parallel = config.precision, config.data, config.parallel
    keep, layers = precision.keep_blocks, config.model.n_layers
    need(keep >= 0, f"precision.keep_blocks={keep} must be 0 or more")
    if not is_fp8(config):
        need(
            keep == 0,
            f"precision.keep_blocks={keep} is for precision=fp8_tensorwise or fp8_rowwise",
        )
        need(
            not precision.fast_backward,
            "precision.fast_backward=true is for precision=fp8_tensorwise or fp8_rowwise",
        )
        return
    name = f"precision.linear={precision.linear.name}"
    need(
        precision.compute is Compute.bf16,
        f"{name} with precision.compute={precision.compute.name}: what is not fp8 has to be bf16",
    )
    need(
        config.engine.name is EngineKind.native,
        f"{name} needs engine=native: DeepSpeed keeps weights of its own",
    )
    need(
        2 * keep < layers,
        f"precision.keep_blocks={keep} at either end leave none of {layers} blocks to {name}",
    )
    for layer, sizes in layer_sizes(config).items():
        for size, what in zip(sizes, ("input", "output"), strict=True):
            need(
                size % MULTIPLE == 0,
                f"blocks.*.{layer} has {size} {what} features on each rank, which {MULTIPLE} does "
                f"not divide: {name} needs that; change the model's sizes or parallel.tensor, or "
                "take precision=bf16",
            )
    need(
        parallel.tensor == 1 or parallel.overlap in (Overlap.auto, Overlap.off),
        f"{name} with parallel.overlap={parallel.overlap.name}: transfers run behind bf16 products "
        "only, use parallel.overlap=off",
    )
    schedule = parallel.pipeline_schedule
    need(
        parallel.pipeline == 1 or schedule not in SPLIT_BACKWARD,
        f"{name} with parallel.pipeline_schedule={schedule.name}, which multiplies in bf16 only: "
        "use 1f1b or interleaved",
    )
    assert data.micro_batch_size is not None
    lengths = [stage.sequence_length for stage in data.ramp if stage.sequence_length is not None]
    for length in (data.sequence_length, *lengths):
        parts = parallel.context * config.trainer.mlp_chunks
        need(
            data.micro_batch_size * length % (MULTIPLE * parts) == 0,
            f"data.micro_batch_size={data.micro_batch_size} sequences of {length} tokens over "
            f"parallel.context={parallel.context} x trainer.mlp_chunks={config.trainer.mlp_chunks} "
            f"do not divide by {MULTIPLE}: {name} needs that",
        )


def check_moments(config: Config) -> None:
    """Refuse moments in bf16 where they are not kept so, or would stand still."""
    optimizer = config.optimizer
    if optimizer.moments is Moments.fp32:
        return
    name = f"optimizer.moments={optimizer.moments.name}"
    need(
        optimizer.name is OptimizerKind.adamw and config.engine.name is EngineKind.native,
        f"{name} needs optimizer=adamw and engine=native: with optimizer={optimizer.name.name} and "
        f"engine={config.engine.name.name} moments are fp32",
    )
    for beta, value in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        need(
            value <= LARGEST_BETA,
            f"optimizer.{beta}={value} with {name}: bf16 has 8 bits, and a moment that moves by "
            f"{1 - value:.2g} of its distance stands still; at most {LARGEST_BETA}",
        )


def layer_sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Input and output features of the linear layers of a block, of one tensor rank's part."""
    model, ranks = config.model, config.parallel.tensor or 1
    assert model.head_size is not None and model.n_kv_heads is not None
    assert model.d_ff is not None
    heads = model.n_heads // ranks * model.head_size
    kv = max(1, model.n_kv_heads // ranks) * model.head_size
    d_ff, gated = model.d_ff // ranks, model.mlp is Mlp.swiglu
    return {
        "attention.qkv": (model.d_model, heads + 2 * kv),
        "attention.out": (heads, model.d_model),
        "mlp.gate_up" if gated else "mlp.up": (model.d_model, 2 * d_ff if gated else d_ff),
        "mlp.down": (d_ff, model.d_model),
    }
