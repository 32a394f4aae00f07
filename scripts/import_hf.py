"""A Hugging Face GPT-2 or Llama folder to a run folder that flashtrain generates and trains from.

    python scripts/import_hf.py models/gpt2 --output runs/gpt2
    python scripts/generate.py run=runs/gpt2 prompt="Once upon"

Reads config.json, safetensors and tokenizer.json; never a pickle. The model is held in host memory
once, in fp32. The last line it prints is a command that trains on from these weights.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.checkpoint import CheckpointError
from flashtrain.checkpoint.huggingface import TOKENIZER_FILE, import_folder
from flashtrain.compose import from_dict, load
from flashtrain.config import Config, to_dict
from flashtrain.launch import REFUSED


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="the run folder to make")
    options = parser.parse_args(arguments)
    try:
        path = import_folder(options.source, options.output)
    except (
        ValueError,
        OSError,
        CheckpointError,
    ) as error:  # DataError, ConfigError are ValueErrors
        print(f"import_hf: {error}", file=sys.stderr)
        return REFUSED
    tree = json.loads((options.output / "config.json").read_text())
    print(f"checkpoint  {path}")
    tokenizer = options.output / TOKENIZER_FILE
    if not tokenizer.is_file():
        print("tokenizer   none: generating text and preparing data need its tokenizer.json")
    else:
        print(f"data        scripts/prepare_data.py ... --tokenizer {tokenizer}")
    print(f"train on    {command(from_dict(tree), options.output)}")
    return 0


def command(config: Config, run: Path) -> str:
    """train.sh with every key of the model that differs from what it would compose."""
    start = ["experiment=null", "data=shards", "data.path=FOLDER"]
    length = f"data.sequence_length={config.data.sequence_length}"
    usual = load(["experiment=null", "data=random", "model.vocabulary=128"])
    pairs = [f"model.weights={run}", length]
    for prefix, given, other in (
        ("model", config.model, usual.model),
        ("position", config.position, usual.position),
        ("position.scaling", config.position.scaling, usual.position.scaling),
    ):
        ours, theirs = plain(given), plain(other)
        pairs += [
            f"{prefix}.{key}={value}"
            for key, value in ours.items()
            if value != theirs[key] and key != "scaling"
        ]
    return " ".join(["scripts/train.sh", *start, *map(shlex.quote, pairs)])


def plain(section: object) -> dict[str, str]:
    """A section of the configuration in Hydra's words."""
    tree = to_dict(section)  # type: ignore[arg-type]
    return {key: json.dumps(value).replace('"', "") for key, value in tree.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
