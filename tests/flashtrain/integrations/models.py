"""Tiny random Hugging Face models, one per family, and their inputs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from flashtrain.integrations.transformers import register

register()

TOKENS = 89
_TEXT = dict(vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=TOKENS - 1)
_DECODER = dict(
    hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, **_TEXT,
)  # fmt: skip
_T5 = dict(
    vocab_size=TOKENS, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=TOKENS - 1,
)  # fmt: skip
_OPT = dict(
    hidden_size=80, ffn_dim=96, num_hidden_layers=2, num_attention_heads=1,  # head size 80
    word_embed_proj_dim=80, max_position_embeddings=64, dropout=0.0, **_TEXT,
)  # fmt: skip
_VISION = dict(
    hidden_size=176, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,  # 88
    image_size=28, patch_size=7,
)  # fmt: skip
_QFORMER = dict(
    vocab_size=TOKENS, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, encoder_hidden_size=176, cross_attention_frequency=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
IMAGE_TOKEN = TOKENS - 2


def _blip2(text: Any) -> Any:
    return transformers.Blip2Config(
        vision_config=_VISION, qformer_config=_QFORMER, text_config=text,
        num_query_tokens=5, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: its class, its config, and what it is fed beside text."""

    model: type[PreTrainedModel]
    config: Callable[[], Any]
    image: bool = False
    image_tokens: int = 5  # places in the prompt that the image takes
    encoder_decoder: bool = False


FAMILIES = {
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, scale_attn_by_inverse_layer_idx=True, **_TEXT,
        ),
    ),
    "llama": Family(
        transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**_DECODER)
    ),
    "opt, head size 80": Family(
        transformers.OPTForCausalLM, lambda: transformers.OPTConfig(**_OPT)
    ),
    "mistral, window": Family(
        transformers.MistralForCausalLM,
        lambda: transformers.MistralConfig(sliding_window=5, **_DECODER),
    ),
    "gemma 2, window and softcap": Family(
        transformers.Gemma2ForCausalLM,
        lambda: transformers.Gemma2Config(
            sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=9, **_DECODER
        ),
    ),
    "gpt-oss, window and sinks": Family(
        transformers.GptOssForCausalLM,
        lambda: transformers.GptOssConfig(
            sliding_window=5, num_local_experts=2, num_experts_per_tok=2,
            experts_implementation="eager", **_DECODER,
        ),
    ),
    "clip, text and vision": Family(
        transformers.CLIPModel,
        lambda: transformers.CLIPConfig(
            vision_config=_VISION,
            text_config=dict(
                hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, **_TEXT,
            ),
        ),
        image=True,
        image_tokens=0,
    ),
    "t5": Family(
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(**_T5),
        encoder_decoder=True,
    ),
    "blip-2 with opt": Family(
        transformers.Blip2ForConditionalGeneration,
        lambda: _blip2(transformers.OPTConfig(**_OPT)),
        image=True,
    ),
    "blip-2 with t5": Family(
        transformers.Blip2ForConditionalGeneration,
        lambda: _blip2(transformers.T5Config(**_T5)),
        image=True,
        encoder_decoder=True,
    ),
}  # fmt: skip


def make(family: Family, *implementations: str) -> list[PreTrainedModel]:
    """The same random model once for each attention implementation, in float32, in eval mode.

    Weights are larger than a trained model's, so that attention is far from uniform.
    """
    made = []
    for implementation in implementations:
        config = copy.deepcopy(family.config())
        made.append(family.model._from_config(config, attn_implementation=implementation).eval())
    with torch.no_grad():
        for name, weight in made[0].named_parameters():
            if weight.dim() > 1 and "layer_norm" not in name:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif "sinks" in name or "bias" in name:
                weight.normal_(std=0.5)
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return made


def inputs(family: Family, padding: str, device: str = "cpu") -> dict[str, Tensor]:
    """A batch of two prompts of 9 and 13 tokens padded on the `padding` side ("" for none)."""
    places = 13
    ids = torch.randint(2, IMAGE_TOKEN, (2, places))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[0, -4:] = 0
    batch = {}
    if family.image:
        image = torch.full((2, family.image_tokens), IMAGE_TOKEN)
        batch["pixel_values"] = torch.randn(2, 3, 28, 28)
        ids = torch.cat((ids[:, :4], image, ids[:, 4:]), 1)  # behind the padding
        mask = torch.cat((mask[:, :4], torch.ones_like(image), mask[:, 4:]), 1)
    batch |= {"input_ids": ids * mask, "attention_mask": mask}
    if family.encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(2, IMAGE_TOKEN, (2, 7))
    return {name: tensor.to(device) for name, tensor in batch.items()}
