"""Hugging Face's config.json of a GPT-2 or Llama model, to flashtrain's configuration and back.

What one side has and the other has not is refused with a sentence that names the key.
"""

import dataclasses
import json
import math
from enum import Enum
from typing import Any

from flashtrain.compose import resolve, resolve_model
from flashtrain.config import (
    Compute,
    Config,
    DataConfig,
    Mlp,
    ModelConfig,
    Norm,
    Parametrization,
    PositionConfig,
    PositionKind,
    PrecisionConfig,
    RopeScaling,
    RopeType,
    Source,
    Target,
    TrainerConfig,
)

Tree = dict[str, Any]
PADDED_TO = 128  # rows of the vocabulary, as prepare_data's vocabularies are
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
SCALINGS = ("default", "linear", "yarn", "llama3")


class FormatError(ValueError):
    """A model that the other side's format cannot hold, said in one sentence."""


def import_config(tree: Tree, run_dir: str) -> Config:
    """The configuration that runs a model of this config.json; `model.vocabulary` is padded.

    What a config.json does not say (data, steps) is left at placeholders.
    """
    kind = tree.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise FormatError(
            f"config.json: model_type={kind}: only gpt2 and llama models can be imported"
        )
    _want(tree, "quantization_config", None, "full weights")
    model, position, length = _from_gpt2(tree) if kind == "gpt2" else _from_llama(tree)
    dtype = tree.get("dtype", tree.get("torch_dtype"))
    half = dtype in ("bfloat16", "float16")
    config = Config(
        name=f"{kind}-imported",
        run_dir=run_dir,
        model=resolve_model(model),
        position=position,
        data=DataConfig(source=Source.random, sequence_length=length, batch_size=1),
        precision=PrecisionConfig(Compute.bf16 if half else Compute.fp32),
        trainer=TrainerConfig(steps=1),
    )
    return resolve(config, 1)


def _from_gpt2(tree: Tree) -> tuple[ModelConfig, PositionConfig, int]:
    _want(tree, "activation_function", "gelu_new", "GELU in its tanh form", GELU_TANH)
    _want(tree, "scale_attn_weights", True, "attention scores over sqrt(head size)")
    _want(tree, "scale_attn_by_inverse_layer_idx", False, "the same scale in all layers")
    _want(tree, "add_cross_attention", False, "self-attention")
    model = ModelConfig(
        n_layers=tree["n_layer"],
        n_heads=tree["n_head"],
        d_model=tree["n_embd"],
        d_ff=tree.get("n_inner"),
        vocabulary=_padded(tree["vocab_size"]),
        norm=Norm.layernorm,
        norm_eps=tree.get("layer_norm_epsilon", 1e-5),
        mlp=Mlp.gelu,
        bias=True,
        tied_head=tree.get("tie_word_embeddings", True),
        init_std=tree.get("initializer_range", 0.02),
    )
    position = PositionConfig(PositionKind.learned, [Target.embedding])
    return model, position, tree.get("n_positions", 1024)


def _from_llama(tree: Tree) -> tuple[ModelConfig, PositionConfig, int]:
    _want(tree, "hidden_act", "silu", "SwiGLU", ("silu", "swish"))
    model = ModelConfig(
        n_layers=tree["num_hidden_layers"],
        n_heads=tree["num_attention_heads"],
        d_model=tree["hidden_size"],
        n_kv_heads=tree.get("num_key_value_heads"),
        head_size=tree.get("head_dim"),
        d_ff=tree["intermediate_size"],
        vocabulary=_padded(tree["vocab_size"]),
        norm=Norm.rmsnorm,
        norm_eps=tree.get("rms_norm_eps", 1e-6),
        mlp=Mlp.swiglu,
        # one without the other: the other's are zeros, which is the same model
        bias=tree.get("attention_bias", False) or tree.get("mlp_bias", False),
        tied_head=tree.get("tie_word_embeddings", False),
        init_std=tree.get("initializer_range", 0.02),
    )
    return model, _rope(tree), tree.get("max_position_embeddings", 2048)


def _rope(tree: Tree) -> PositionConfig:
    """transformers before 5 writes rope_theta and rope_scaling, later ones rope_parameters."""
    keys: Tree = {"rope_theta": tree.get("rope_theta", 10000.0)}
    keys |= tree.get("rope_scaling") or {}
    keys |= tree.get("rope_parameters") or {}
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind not in SCALINGS:
        raise FormatError(
            f"config.json: rope_type={kind}: flashtrain has {', '.join(SCALINGS)} of Hugging "
            "Face's kinds"
        )
    _want(keys, "truncate", True, "YaRN's ramp between whole dimensions")
    _want(keys, "partial_rotary_factor", 1.0, "rotations of whole heads in Llama")
    scaling = RopeScaling(RopeType[kind])
    if kind != "default":
        names = {item.name for item in dataclasses.fields(RopeScaling)} - {"rope_type"}
        given = {key: keys[key] for key in names if keys.get(key) is not None}
        original = keys.get("original_max_position_embeddings") or tree["max_position_embeddings"]
        if kind in ("yarn", "llama3"):
            given["original_max_position_embeddings"] = original
        if kind == "yarn":
            given.setdefault("factor", tree["max_position_embeddings"] / original)
            if keys.get("attention_factor") is None and keys.get("mscale_all_dim"):
                given["attention_factor"] = _yarn_magnitude(keys, given["factor"])
        scaling = dataclasses.replace(scaling, **given)
    return PositionConfig(
        PositionKind.rope, [Target.q, Target.k], rope_theta=keys["rope_theta"], scaling=scaling
    )


def _yarn_magnitude(keys: Tree, factor: float) -> float:
    """DeepSeek's: the ratio of two of YaRN's factors."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    # transformers looks at both keys or at none
    if not keys.get("mscale"):
        return magnitude(1.0)
    return magnitude(keys["mscale"]) / magnitude(keys["mscale_all_dim"])


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // PADDED_TO) * PADDED_TO


def _want(
    tree: Tree, key: str, default: object, what: str, allowed: tuple[object, ...] = ()
) -> None:
    value = tree.get(key, default)
    if value not in (allowed or (default,)):
        raise FormatError(f"config.json: {key}={value}: flashtrain has {what} only")


def format_of(config: Config) -> str:
    """ "llama" or "gpt2", whichever is nearer."""
    return "llama" if config.position.kind is PositionKind.rope else "gpt2"


def export_config(config: Config, kind: str, vocabulary: int, end_of_text: int | None) -> Tree:
    """config.json for a model of `config`, which is resolved. Raises FormatError."""
    tree = _to_gpt2(config) if kind == "gpt2" else _to_llama(config)
    return tree | {
        "model_type": kind,
        "vocab_size": vocabulary,
        "tie_word_embeddings": config.model.tied_head,
        "initializer_range": config.model.init_std,
        "bos_token_id": end_of_text if kind == "gpt2" else None,
        "eos_token_id": end_of_text,
    }


def _to_gpt2(config: Config) -> Tree:
    model, position = config.model, config.position
    assert model.head_size is not None
    _refuse(
        "GPT-2",
        ("model.parametrization", model.parametrization, Parametrization.standard),
        ("position.kind", position.kind, PositionKind.learned),
        ("position.applies_to", position.applies_to, [Target.embedding]),
        ("model.norm", model.norm, Norm.layernorm),
        ("model.mlp", model.mlp, Mlp.gelu),
        ("model.n_kv_heads", model.n_kv_heads, model.n_heads),
        ("model.head_size", model.head_size, model.d_model // model.n_heads),
        ("model.qk_norm", model.qk_norm, False),
        ("model.logit_softcap", model.logit_softcap, None),
    )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.data.sequence_length,
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _to_llama(config: Config) -> Tree:
    model, position = config.model, config.position
    _refuse(
        "Llama",
        ("model.parametrization", model.parametrization, Parametrization.standard),
        ("position.kind", position.kind, PositionKind.rope),
        ("position.applies_to", sorted(position.applies_to, key=lambda t: t.name),
         [Target.k, Target.q]),
        ("position.partial_rotary_factor", position.partial_rotary_factor, 1.0),
        ("model.norm", model.norm, Norm.rmsnorm),
        ("model.mlp", model.mlp, Mlp.swiglu),
        ("model.qk_norm", model.qk_norm, False),
        ("model.logit_softcap", model.logit_softcap, None),
    )  # fmt: skip
    if model.d_model % model.n_heads:
        raise FormatError(
            f"model.d_model={model.d_model} is not a multiple of model.n_heads={model.n_heads}, "
            "which Hugging Face's Llama format asks for"
        )
    theta, scaling = _scaling(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.data.sequence_length,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def _scaling(config: Config) -> tuple[float, Tree | None]:
    """rope_theta and rope_scaling; transformers before 5 and after it, and vLLM, read these."""
    position, size = config.position, config.model.head_size
    theta, scaling = position.rope_theta, position.scaling
    assert size is not None
    match scaling.rope_type:
        case RopeType.default:
            return theta, None
        case RopeType.ntk:  # no name over there, but it is a larger theta
            return theta * (scaling.factor ** (size / (size - 2)) if size > 2 else 1.0), None
        case RopeType.linear:
            return theta, {"rope_type": "linear", "factor": scaling.factor}
        case RopeType.yarn:
            names = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"]
            names += ["attention_factor"] * (scaling.attention_factor is not None)
        case _:
            names = ["factor", "original_max_position_embeddings"]
            names += ["low_freq_factor", "high_freq_factor"]
    values = {name: getattr(scaling, name) for name in names}
    return theta, {"rope_type": scaling.rope_type.name, **values}


def _refuse(name: str, *rules: tuple[str, object, object]) -> None:
    for key, value, wanted in rules:
        if value != wanted:
            raise FormatError(
                f"{key}={_said(value)} cannot be said in Hugging Face's {name} format, which has "
                f"{_said(wanted)} there"
            )


def _said(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(_said(item) for item in value)}]"
    if isinstance(value, Enum):
        return value.name
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
