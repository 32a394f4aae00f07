"""Where each parameter of flashtrain's GPT lies in a Hugging Face GPT-2 or Llama file.

Rows of a weight are output features here; GPT-2's own layers keep them as columns.
"""

from dataclasses import dataclass

from flashtrain.config import ModelConfig

# what files hold besides weights, and what a tied head repeats
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Foreign:
    """One or more of their tensors; ours has their rows one after the other."""

    names: tuple[str, ...]
    transposed: bool = False


def foreign_names(kind: str, model: ModelConfig) -> dict[str, Foreign]:
    """Our parameter name -> theirs, of every weight and bias that the format can hold."""
    table = _gpt2(model.n_layers) if kind == "gpt2" else _llama(model)
    if not model.tied_head:
        table["head.weight"] = Foreign(("lm_head.weight",))
    return table


def _gpt2(n_layers: int) -> dict[str, Foreign]:
    table = {
        "embedding.weight": Foreign(("transformer.wte.weight",)),
        "position.weight": Foreign(("transformer.wpe.weight",)),
    }
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for leaf in ("weight", "bias"):
            for our_norm, their_norm in (("norm_attention", "ln_1"), ("norm_mlp", "ln_2")):
                table[f"{ours}.{our_norm}.{leaf}"] = Foreign((f"{theirs}.{their_norm}.{leaf}",))
            for our_linear, their_linear in (
                ("attention.qkv", "attn.c_attn"),
                ("attention.out", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                names = (f"{theirs}.{their_linear}.{leaf}",)
                table[f"{ours}.{our_linear}.{leaf}"] = Foreign(names, leaf == "weight")
    for leaf in ("weight", "bias"):
        table[f"norm.{leaf}"] = Foreign((f"transformer.ln_f.{leaf}",))
    return table


def _llama(model: ModelConfig) -> dict[str, Foreign]:
    table = {"embedding.weight": Foreign(("model.embed_tokens.weight",))}
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        table[f"{ours}.norm_attention.weight"] = Foreign((f"{theirs}.input_layernorm.weight",))
        table[f"{ours}.norm_mlp.weight"] = Foreign((f"{theirs}.post_attention_layernorm.weight",))
        for leaf in ("weight", "bias")[: 1 + model.bias]:
            for our_linear, their_linears in (
                ("attention.qkv", [f"self_attn.{x}_proj" for x in "qkv"]),
                ("attention.out", ["self_attn.o_proj"]),
                ("mlp.gate_up", ["mlp.gate_proj", "mlp.up_proj"]),
                ("mlp.down", ["mlp.down_proj"]),
            ):
                names = tuple(f"{theirs}.{linear}.{leaf}" for linear in their_linears)
                table[f"{ours}.{our_linear}.{leaf}"] = Foreign(names)
    table["norm.weight"] = Foreign(("model.norm.weight",))
    return table


def their_rows(name: str, rows: int, model: ModelConfig) -> list[int]:
    """How many of our `rows` each of their tensors has."""
    assert model.n_kv_heads is not None and model.head_size is not None
    if name.endswith((".attention.qkv.weight", ".attention.qkv.bias")):
        kv = model.n_kv_heads * model.head_size
        return [rows - 2 * kv, kv, kv]
    return [rows // 2, rows // 2]  # gate and up
