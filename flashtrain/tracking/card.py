"""A configuration in a few lines: what a run prints when it starts, and its report says again."""

import math

from flashtrain.config import (
    Config,
    LinearKind,
    PositionConfig,
    PositionKind,
    PrecisionConfig,
    Source,
)
from flashtrain.layout import describe_layout
from flashtrain.model.cache import cache_bytes_per_token
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import n_parameters


def card(config: Config, world: int) -> list[tuple[str, str]]:
    """Label and text of each line. `config` is resolved for `world` processes."""
    model, data, trainer, parallel = config.model, config.data, config.trainer, config.parallel
    sharing = (parallel.tensor or 1) * parallel.context * parallel.pipeline  # of one data rank
    per_step = data.batch_size * data.sequence_length
    parameters = n_parameters(model, config.position, data.sequence_length)
    micro_batch = data.micro_batch_size or data.batch_size * sharing // world
    accumulation = data.batch_size // (micro_batch * (world // sharing))
    mixture = ", ".join(f"{source.weight:g} {name}" for name, source in data.sources.items())
    made = "made-up tokens" if data.source is Source.random else "embedded"
    cache = cache_bytes_per_token(model, DTYPES[config.precision.compute])
    return [
        (
            "model",
            f"{model.n_layers} layers, {model.n_heads} heads of {model.head_size} "
            f"({model.n_kv_heads} key/value), width {model.d_model}, {model.mlp.name} "
            f"{model.d_ff}, vocabulary {model.vocabulary}",
        ),
        ("parameters", f"{count(parameters)} ({parameters:,})"),
        ("positions", describe_position(config.position)),
        ("data", mixture or data.path or made),
        (
            "step",
            f"{per_step:,} tokens: {data.batch_size} sequences of {data.sequence_length}, "
            f"micro-batches of {micro_batch}, {accumulation} per rank and step",
        ),
        ("training", f"{trainer.steps} steps, {count(trainer.steps * per_step)} tokens"),
        ("layout", f"{describe_layout(parallel, world)}, {describe_precision(config.precision)}"),
        ("generating", f"{cache:,} bytes of keys and values for each token of a text"),
    ]


def describe_position(position: PositionConfig) -> str:
    """As in `rope on q,k`."""
    if position.kind in (PositionKind.none, PositionKind.alibi):  # nothing, and scores
        return position.kind.name
    return f"{position.kind.name} on {','.join(target.name for target in position.applies_to)}"


def describe_precision(precision: PrecisionConfig) -> str:
    """As in `bf16, linear layers fp8_rowwise`."""
    if precision.linear is LinearKind.compute:
        return precision.compute.name
    fast = ", fast backward" if precision.fast_backward else ""
    return f"{precision.compute.name}, linear layers {precision.linear.name}{fast}"


def count(value: float) -> str:
    """1234567 -> '1.23M'."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
