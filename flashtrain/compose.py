"""From overrides to a config that can run: Hydra composes, then numbers are held to each other.

Three doors stand behind each other: OmegaConf's types (unknown key, wrong type, wrong enum), the
cross-field rules here, and `door.py`, which looks at files and the machine. Every refusal is a
ConfigError with one sentence naming the values, the limit and the way out.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashtrain.config import (
    Config,
    ConfigError,
    DataConfig,
    Mlp,
    ModelConfig,
    Packing,
    Parametrization,
    PositionConfig,
    PositionKind,
    RopeType,
    Source,
    Target,
    to_dict,
)
from flashtrain.layout import check_layout, need, resolve_parallel, whole_micro_batch
from flashtrain.pipelining import check_pipeline
from flashtrain.precision import check_moments, check_precision

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(overrides: list[str], world_size: int = 1, configs: Path = CONFIGS) -> Config:
    """Compose `configs/train.yaml` with Hydra overrides, check it and fill in what is derived.

    Raises ConfigError for every key, type or combination that cannot run on `world_size` ranks.
    """
    return resolve(read(overrides, configs), world_size)


def read(overrides: list[str], configs: Path = CONFIGS) -> Config:
    """Composed as `load` does, nothing derived, and checked for its keys and types only."""
    for override in overrides:
        if override.startswith(("-", "=")):
            raise ConfigError(f"{override!r} is not a Hydra override: write key=value")
    # Hydra takes a group out with ~group only; group=null is what people write
    overrides = [
        f"~{group}" if null and not value and (configs / group).is_dir() else override
        for override in overrides
        for group, null, value in [override.partition("=null")]
    ]
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            tree = compose("train", overrides)
        # `+key=...` slips past the schema during composition; a fresh one rejects it
        plain = OmegaConf.to_container(tree, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    except ValueError as error:  # Hydra's own word on group=3
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    assert isinstance(config, Config)
    return config


def _one_line(error: BaseException) -> str:
    """The sentence of a Hydra / OmegaConf error, with the key it speaks of and the way out."""
    root = error
    while isinstance(root.__cause__, OmegaConfBaseException):
        root = root.__cause__
    key, value = getattr(root, "full_key", None), getattr(root, "value", None)
    section = getattr(root, "object_type", None)  # the dataclass that refused
    sentence = next((line.strip() for line in str(root).splitlines() if line.strip()), "")
    if (override := getattr(root, "override", None)) is not None:
        return (
            f"{override!r} is not a Hydra override: write key=value, a list as [a,b] and text "
            "with blanks or brackets as key='\"text\"'"
        )
    if choices := getattr(root, "options", None):
        group, _, choice = getattr(root, "missing_cfg_file", "").rpartition("/")
        return f"{group}={choice}: no such choice; choose from {', '.join(choices)}"
    if isinstance(root, KeyError | AttributeError) and dataclasses.is_dataclass(section):
        names = ", ".join(item.name for item in dataclasses.fields(section))
        return f"{key}: no such key; {str(key).rpartition('.')[0] or 'the root'} has {names}"
    if sentence.startswith("Ambiguous value"):
        return (
            f"{sentence}: write a list as key=[a,b]; one run takes one value, scripts/sweep.py "
            "takes several"
        )
    for phrase, clear in {
        "missing mandatory value": f"{key} must be set",
        "is not Optional": f"{key}=null: a value must be set",
        "is not a ListConfig": f"{key}={value}: write a list, as in {key}=[{value}]",
    }.items():
        if phrase in sentence:
            return clear
    return f"{key}: {sentence}" if key and str(key) not in sentence else sentence


def resolve(config: Config, world_size: int) -> Config:
    """A copy with every derived value filled in and every cross-field rule checked."""
    model, data = config.model, config.data
    missing = [
        f"{section.name}.{item.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(part := getattr(config, section.name))
        for item in dataclasses.fields(part)
        if getattr(part, item.name) == MISSING
    ]
    need(not missing, f"{', '.join(missing)} must be set")
    for key, value in {
        "model.n_layers": model.n_layers,
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.n_kv_heads,
        "model.d_model": model.d_model,
        "model.head_size": model.head_size,
        "model.d_ff": model.d_ff,
        "model.vocabulary": model.vocabulary,
        "model.logit_softcap": model.logit_softcap,
        "model.norm_eps": model.norm_eps,
        "model.init_std": model.init_std,
        "model.base_width": model.base_width,
        "model.base_head_size": model.base_head_size,
        "data.sequence_length": data.sequence_length,
        "data.batch_size": data.batch_size,
        "data.micro_batch_size": data.micro_batch_size,
        "data.validation_tokens": data.validation_tokens,
        "data.shuffle_shards": data.shuffle_shards,
        "data.cache_gb": data.cache_gb,
        "data.network_minutes": data.network_minutes,
        "parallel.tensor": config.parallel.tensor,
        "parallel.context": config.parallel.context,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.stages_per_rank": config.parallel.stages_per_rank,
        "parallel.shard": config.parallel.shard,
        "parallel.replicate": config.parallel.replicate,
        "engine.bucket_mb": config.engine.bucket_mb,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.eps": config.optimizer.eps,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "trainer.steps": config.trainer.steps,
        "trainer.stop_at": config.trainer.stop_at,
        "trainer.time_limit": config.trainer.time_limit,
        "trainer.log_every": config.trainer.log_every,
        "trainer.bad_steps": config.trainer.bad_steps,
        "trainer.spike.deviations": config.trainer.spike.deviations,
        "trainer.spike.steps": config.trainer.spike.steps,
        "trainer.spike.window": config.trainer.spike.window,
        "trainer.check_determinism": config.trainer.check_determinism,
        "trainer.hang_timeout": config.trainer.hang_timeout,
        "trainer.node_timeout": config.trainer.node_timeout,
        "trainer.evaluate_every": config.trainer.evaluate_every,
        "trainer.evaluate_sequences": config.trainer.evaluate_sequences,
        "trainer.sample_every": config.trainer.sample_every,
        "trainer.sample_tokens": config.trainer.sample_tokens,
        "trainer.benchmark.every": config.trainer.benchmark.every,
        "trainer.benchmark.limit": config.trainer.benchmark.limit,
        "position.rope_theta": config.position.rope_theta,
        **{
            f"position.scaling.{key}": value
            for key, value in dataclasses.asdict(config.position.scaling).items()
            if key != "rope_type"
        },
        "tracking.peak_tflops": config.tracking.peak_tflops,
    }.items():
        positive = value is None or (value > 0 and math.isfinite(value))
        need(positive, f"{key}={value} must be a number above 0")
    for key, value, low, high in (
        ("optimizer.beta1", config.optimizer.beta1, 0, 0.99999),  # 1 would divide by 1 - beta = 0
        ("optimizer.beta2", config.optimizer.beta2, 0, 0.99999),
        ("optimizer.momentum", config.optimizer.momentum, 0, 0.99999),
        ("schedule.final_ratio", config.schedule.final_ratio, 0, 1),
        ("schedule.decay_share", config.schedule.decay_share, 0, 1),
        ("position.partial_rotary_factor", config.position.partial_rotary_factor, 0, 1),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0, math.inf),
        ("schedule.warmup_steps", config.schedule.warmup_steps, 0, math.inf),
        ("loss.z_loss", config.loss.z_loss, 0, math.inf),
        ("checkpoint.keep_best", config.checkpoint.keep_best, 0, math.inf),
        ("trainer.rollbacks", config.trainer.rollbacks, 0, math.inf),
    ):
        need(low <= value <= high, f"{key}={value} must lie between {low} and {high}")

    need(
        re.fullmatch(r"[\w.+-]+", config.name) is not None,
        f"name={config.name!r} must be letters, digits and . _ + - only: it names a folder",
    )
    need_window(config.trainer.profile)
    need(config.run_dir != "", "run_dir is empty: name a folder or leave it null")
    need(0 <= config.seed < 2**63, f"seed={config.seed} must lie between 0 and 2^63 - 1")
    parallel = resolve_parallel(config.parallel, config.engine.name, world_size)
    micro_batch = data.micro_batch_size or whole_micro_batch(data.batch_size, parallel)
    config = dataclasses.replace(
        config,
        model=resolve_model(model),
        data=dataclasses.replace(data, micro_batch_size=micro_batch),
        parallel=parallel,
    )
    need(
        config.loss.fused or config.loss.z_loss == 0,
        f"loss.z_loss={config.loss.z_loss} needs loss.fused=true: the loss over all logits has no "
        "such term",
    )
    check_position(config.model, config.position)
    check_layout(config, world_size)
    if parallel.pipeline > 1:
        check_pipeline(config)
    check_precision(config)
    check_moments(config)
    check_data(data)
    check_retention(config)
    if data.source is Source.random:
        need(model.vocabulary is not None, "model.vocabulary must be set for data.source=random")
    if config.run_dir is None:
        config.run_dir = f"runs/{config.name}-{fingerprint(config)}"
    return config


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Head count, head size and MLP width filled in; refuses sizes that do not divide."""
    heads, width = model.n_heads, model.d_model
    if model.head_size is None:
        need(
            width % heads == 0,
            f"model.d_model={width} is not divisible by model.n_heads={heads}: "
            "change one of them or set model.head_size",
        )
    size = model.head_size or width // heads
    mup = model.parametrization is Parametrization.mup
    need(
        mup == (model.base_width is not None),
        f"model.parametrization={model.parametrization.name} with model.base_width="
        f"{model.base_width}: mup needs the width at which it was tuned, standard has none",
    )
    need(
        mup or model.base_head_size is None,
        f"model.base_head_size={model.base_head_size} is for model.parametrization=mup",
    )
    need(size <= 256, f"head size {size} is above 256, the largest the attention kernels take")
    kv = model.n_kv_heads or heads
    need(
        heads % kv == 0,
        f"model.n_heads={heads} is not a multiple of model.n_kv_heads={kv}",
    )
    d_ff = model.d_ff
    if d_ff is None:
        d_ff = 4 * width if model.mlp is not Mlp.swiglu else -(-8 * width // 3 // 256) * 256
    return dataclasses.replace(model, n_kv_heads=kv, head_size=size, d_ff=d_ff)


def need_window(profile: list[int]) -> None:
    """Refuse steps that cannot be traced."""
    need(
        not profile or (len(profile) == 2 and 2 <= profile[0] <= profile[1]),
        f"trainer.profile={profile}: write [first,last], with 2 <= first <= last; step 1 compiles",
    )


def check_retention(config: Config) -> None:
    """Refuse to keep what would not be saved, or not be judged."""
    saving, evaluate_every = config.checkpoint, config.trainer.evaluate_every
    need(
        saving.keep_every is None or saving.keep_every % saving.every == 0,
        f"checkpoint.keep_every={saving.keep_every} is not a multiple of checkpoint.every="
        f"{saving.every}, so some of the steps it names are never saved",
    )
    need(
        saving.keep_best == 0 or saving.every % evaluate_every == 0,
        f"checkpoint.keep_best={saving.keep_best} needs an evaluation at each checkpoint, and "
        f"checkpoint.every={saving.every} is not a multiple of trainer.evaluate_every="
        f"{evaluate_every}",
    )


def check_data(data: DataConfig) -> None:
    """Refuse keys of `data` that contradict each other."""
    if data.source is Source.shards:
        need(
            data.path is not None or bool(data.sources),
            "data.path must name a folder of token shards, or data.sources several "
            "(configs/data/mixture.yaml); make one with "
            "`python scripts/prepare_data.py INPUT... --output FOLDER`",
        )
    need(
        data.path is None or not data.sources,
        f"data.path={data.path} and data.sources={','.join(data.sources)}: name one or the other",
    )
    need(
        data.source is Source.shards or not data.sources,
        f"data.sources={','.join(data.sources)} are token shards: set data.source=shards",
    )
    need(
        data.source is not Source.random or data.packing is Packing.none,
        f"data.packing={data.packing.name}: made-up tokens have no documents to pack",
    )
    need(
        data.shuffle_shards is None or data.source is not Source.random,
        f"data.shuffle_shards={data.shuffle_shards}: made-up tokens lie in no shards",
    )
    need(
        data.validation_path is None or data.validation_tokens is None,
        f"data.validation_path={data.validation_path} and data.validation_tokens="
        f"{data.validation_tokens}: name one or the other",
    )
    need(
        data.validation_tokens is None or not data.sources,
        f"data.validation_tokens={data.validation_tokens} is for one data.path: for a mixture name "
        "data.validation_path",
    )
    need(
        bool(data.sources) or not data.mix_changes,
        "data.mix_changes are weights of data.sources, and there are none",
    )


def check_position(model: ModelConfig, position: PositionConfig) -> None:
    """Refuse what a kind of position cannot touch."""
    targets = set(position.applies_to)
    names = ",".join(t.name for t in position.applies_to)
    kind = position.kind
    need(bool(targets), "position.applies_to is empty: write position=none for no positions")
    if kind is PositionKind.alibi:
        need(
            targets == {Target.q, Target.k},
            f"position.applies_to=[{names}]: ALiBi is a bias on q.k scores, so it takes [q,k] only",
        )
    if kind is PositionKind.rope:
        need(
            Target.embedding not in targets,
            f"position.applies_to=[{names}]: RoPE rotates heads and cannot go onto the embedding; "
            "choose any of q, k, v",
        )
        assert model.head_size is not None
        rotated = int(model.head_size * position.partial_rotary_factor)
        need(
            rotated >= 2 and rotated % 2 == 0,
            f"RoPE turns pairs: head size {model.head_size} x position.partial_rotary_factor="
            f"{position.partial_rotary_factor} gives {rotated}, which must be even and at least 2",
        )
        scaling = position.scaling
        if scaling.rope_type in (RopeType.yarn, RopeType.llama3):
            need(
                scaling.original_max_position_embeddings is not None,
                f"position.scaling.rope_type={scaling.rope_type.name} needs "
                "position.scaling.original_max_position_embeddings",
            )
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        need(
            scaling.rope_type is not RopeType.llama3 or low < high,
            f"position.scaling.low_freq_factor={low} must lie below position.scaling."
            f"high_freq_factor={high}: frequencies between the two are blended",
        )
        need(
            scaling.rope_type is not RopeType.yarn or position.rope_theta > 1,
            f"position.rope_theta={position.rope_theta} must be above 1 with "
            "position.scaling.rope_type=yarn, which divides by its logarithm",
        )
    if Target.embedding in targets:
        need(
            len(targets) == 1,
            f"position.applies_to=[{names}]: `embedding` already reaches q, k and v; name it alone",
        )


def fingerprint(config: Config) -> str:
    """Eight hex digits over all that changes the numbers: not layout, tracking or cadence."""
    tree = to_dict(config)
    for key in ("run_dir", "name", "parallel", "engine", "checkpoint", "tracking", "attention"):
        del tree[key]
    tree["trainer"] = {"steps": config.trainer.steps}
    del tree["loss"]["fused"]
    for key in ("micro_batch_size", "cache_dir", "cache_gb", "network_minutes"):
        del tree["data"][key]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; raises ConfigError for a tree this version does not know."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(config, Config)
    return config
