"""A flashtrain checkpoint, of any layout, to a Hugging Face GPT-2 or Llama folder.

    python scripts/export_hf.py runs/gpt2_124m-1a2b3c4d --output exported
    python scripts/export_hf.py runs/NAME/checkpoints/step-00000500 --output out --dtype float32

AutoModelForCausalLM.from_pretrained("exported") and `vllm serve exported` read it. A model that
neither format can hold (ALiBi, positions on values, softcap, qk_norm, ...) is refused by name.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashtrain.checkpoint import CheckpointError, locate
from flashtrain.checkpoint.huggingface import export_folder
from flashtrain.launch import REFUSED


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="a run folder (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--format", choices=("gpt2", "llama"), help="default: what its positions need"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: what the run computes with"
    )
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    try:
        path = locate(options.run)
        tree = export_folder(path, options.output, options.format, dtype)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return REFUSED
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(
        f"{options.output}: {tree['architectures'][0]} in {tree['torch_dtype']}, vocabulary "
        f"{tree['vocab_size']}, {size / 1e9:.2f} GB, from {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
