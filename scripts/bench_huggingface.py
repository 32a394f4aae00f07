"""A Llama of 1.2 B random parameters with flashtrain's attention, beside eager and SDPA, on a GPU.

    python scripts/bench_huggingface.py                     # 4 x 2048 tokens, bf16
    python scripts/bench_huggingface.py --batch 1 --length 8192

First the error of the logits of 2 x 512 tokens beside eager's, both against float64, without
padding, padded on the left and on the right. Then the median time of a forward pass, of forward and
backward, and of generating 32 tokens by each implementation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from flashtrain.integrations.transformers import register
from scripts.parts.huggingface_compare import IMPLEMENTATIONS, agreement, milliseconds

SIZES = dict(  # those of Llama 3.2 1B but for its vocabulary
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=32000, max_position_embeddings=16384,
)  # fmt: skip
TINY = dict(SIZES, hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=500)


def batch_of(model: LlamaForCausalLM, batch: int, length: int, padding: str) -> dict[str, Tensor]:
    """Random tokens; with padding, row b lacks b / batch of them on that side."""
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)
    mask = torch.ones_like(ids)
    for row in range(batch):
        n = row * length // batch
        mask[row, slice(0, n) if padding == "left" else slice(length - n, length)] = not padding
    return {"input_ids": ids, "attention_mask": mask}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--tiny", action="store_true", help="2 narrow layers, to try the script")
    options = parser.parse_args()

    register()
    set_seed(0)
    torch.set_default_device(options.device)
    model = LlamaForCausalLM(LlamaConfig(**(TINY if options.tiny else SIZES))).bfloat16().eval()
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    count = sum(p.numel() for p in model.parameters()) / 1e9
    print(
        f"Llama, {count:.2f} B parameters, bf16, {name}, torch {torch.__version__},"
        f" transformers {transformers.__version__}"
    )
    passed = True
    for padding in ("", "left", "right"):
        print(f" 2 x 512 tokens, {f'padded on the {padding}' if padding else 'no padding'}")
        passed &= agreement(model, batch_of(model, 2, 512, padding), gradients=False)

    print(f" {options.batch} x {options.length} tokens, milliseconds")
    for padding in ("", "left"):
        batch = batch_of(model, options.batch, options.length, padding)

        @torch.no_grad()
        def forward(batch: dict[str, Tensor] = batch) -> None:
            model(**batch, use_cache=False)

        def train(batch: dict[str, Tensor] = batch) -> None:
            model.zero_grad()
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

        def generate(batch: dict[str, Tensor] = batch) -> None:
            model.generate(**batch, do_sample=False, min_new_tokens=32, max_new_tokens=32)

        for implementation in (*IMPLEMENTATIONS, "sdpa"):
            model.set_attn_implementation(implementation)
            times = [milliseconds(call, options.device) for call in (forward, train, generate)]
            print(
                f"  {implementation:<10} {f'{padding}-padded' if padding else 'unpadded':<11}"
                "  forward {:8.1f}  forward + backward {:8.1f}  generate 32 {:8.1f}".format(*times)
            )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
