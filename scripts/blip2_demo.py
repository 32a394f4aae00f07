"""BLIP-2 with flashtrain's attention in all of its towers, beside eager; random weights or given.

    python scripts/blip2_demo.py                            # tiny, float32 on the CPU, OPT
    python scripts/blip2_demo.py --language t5
    python scripts/blip2_demo.py --size base                # bf16 on a GPU
    python scripts/blip2_demo.py --weights Salesforce/blip2-opt-2.7b        # or a folder

Images and prompts of two lengths, padded on the left, go in. Shown: the error of logits and
gradients beside eager's, both against float64; the tokens that each generates; the loss before and
after one training step; the time of a forward and backward pass and of generating. `base` has the
widths of BLIP-2 (vision heads of 88, a Q-Former of 768) and 12 layers in each tower.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    T5Config,
    set_seed,
)

from flashtrain.integrations.transformers import register
from scripts.parts.huggingface_compare import IMPLEMENTATIONS, agreement, milliseconds

IMAGE = 3  # the token that stands where the image goes, in random models
PROMPTS = {"tiny": (9, 6), "base": (64, 40)}  # tokens


def config(size: str, language: str) -> Blip2Config:
    """Shapes of BLIP-2; no dropout, so that gradients can be compared."""
    if size == "tiny":
        layers, vision, query, text, queries = 2, (176, 352, 2), (64, 128, 4), (80, 160, 2), 8
        image = dict(image_size=28, patch_size=7)
    else:
        layers, vision, query, text = 12, (1408, 6144, 16), (768, 3072, 12), (768, 3072, 12)
        queries, image = 32, dict(image_size=224, patch_size=14)

    def tower(width: int, inner: int, heads: int, **more: Any) -> dict[str, Any]:
        sizes = dict(hidden_size=width, intermediate_size=inner, num_attention_heads=heads)
        return {**sizes, "num_hidden_layers": layers, **more}

    width, inner, heads = text
    words: Any = dict(vocab_size=1000 if size == "tiny" else 32000, pad_token_id=0)
    if language == "t5":
        words |= dict(d_model=width, d_ff=inner, num_heads=heads, d_kv=width // heads)
        text_config: Any = T5Config(
            num_layers=layers, decoder_start_token_id=0, dropout_rate=0.0, **words
        )
    else:
        text_config = OPTConfig(
            **tower(*text), ffn_dim=inner, word_embed_proj_dim=width, dropout=0.0, **words
        )
    return Blip2Config(
        vision_config=tower(*vision, **image),
        qformer_config=tower(
            *query, encoder_hidden_size=vision[0], hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=text_config,
        num_query_tokens=queries,
        image_token_index=IMAGE,
    )  # fmt: skip


def batch_of(model: Blip2ForConditionalGeneration, size: str) -> dict[str, Tensor]:
    """Two images, a prompt for each, padded on the left, with labels."""
    queries, edge = model.config.num_query_tokens, model.config.vision_config.image_size
    longest = max(PROMPTS[size])
    image = model.config.image_token_index
    ids = torch.randint(4, model.config.text_config.vocab_size, (2, queries + longest))
    ids[ids == image] = 4
    mask = torch.ones_like(ids)
    for row, tokens in enumerate(PROMPTS[size]):
        padding = longest - tokens
        ids[row, padding : padding + queries] = image
        ids[row, :padding] = mask[row, :padding] = 0
    labels = torch.where((mask > 0) & (ids != image), ids, -100)
    batch = {"pixel_values": torch.randn(2, 3, edge, edge), "input_ids": ids}
    batch |= {"attention_mask": mask, "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=PROMPTS, default="tiny", help="default tiny")
    parser.add_argument(
        "--language", choices=("opt", "t5"), default="opt", help="the language model (default opt)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU where there is one",
    )
    parser.add_argument("--weights", help="a folder or a name at Hugging Face, not random ones")
    parser.add_argument("--tokens", type=int, default=8, help="to generate")
    options = parser.parse_args()

    register()
    set_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.weights:
        model = Blip2ForConditionalGeneration.from_pretrained(options.weights, dtype=dtype)
    else:
        model = Blip2ForConditionalGeneration(config(options.size, options.language))
    model = model.eval().to(options.device, dtype)
    batch = batch_of(model, options.size)
    given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
    prompt = {n: x for n, x in given.items() if n != "labels"}
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"BLIP-2 {options.weights or f'{options.size} with {options.language}, random weights'},"
        f" {count:.1f} M parameters, {dtype},"
        f" {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}"
    )
    passed = agreement(model, batch)

    def train() -> None:
        model.zero_grad()
        model(**given).loss.backward()

    def generate() -> Tensor:
        tokens: Tensor = model.generate(
            **prompt, do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens
        )
        return tokens

    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        told = generate()[0, -options.tokens :].tolist()
        step, talk = milliseconds(train, options.device), milliseconds(generate, options.device)
        print(f"  {name:<10} forward + backward {step:.1f} ms, generate {talk:.1f} ms: {told}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train()
    before = model(**given).loss.item()
    optimizer.step()
    after = model(**given).loss.item()
    print(f"  one step of training with flashtrain: loss {before:.4f} -> {after:.4f}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
