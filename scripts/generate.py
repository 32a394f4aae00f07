"""Text from a trained run, on one process, whatever layout wrote the checkpoint.

    python scripts/generate.py run=runs/shakespeare-1a2b3c4d prompt="ROMEO:" tokens=200

run          a run folder (its newest valid checkpoint) or one checkpoint folder inside it
prompt       the text to go on from (default: a line break)
tokens       how many to draw (default 200)
temperature  0 takes the likeliest token always (default 0.8)
top_k top_p  cut the tail of the distribution (default: off)
seed         another number, another text (default 0)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.compose import from_dict
from flashtrain.config import ConfigError
from flashtrain.data.tokenizer import load_tokenizer
from flashtrain.launch import REFUSED
from flashtrain.model.sample import sample
from flashtrain.parallel.mesh import SINGLE

DEFAULTS = {
    "run": "", "prompt": "\n", "tokens": "200", "temperature": "0.8", "top_k": "", "top_p": "",
    "seed": "0",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        print(generate(read(arguments)))
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return REFUSED
    return 0


def read(arguments: list[str]) -> dict[str, str]:
    """key=value pairs over the defaults."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in options:
            known = ", ".join(options)
            raise ConfigError(f"{argument!r} is not key=value with one of the keys {known}")
        options[key] = value
    if not options["run"]:
        raise ConfigError("run= must name a run folder, as train.sh printed it at the end")
    return options


def generate(options: dict[str, str]) -> str:
    path = find_checkpoint(Path(options["run"]))
    config = from_dict(checkpoint.read_meta(path)["config"])
    tokenizer = load_tokenizer(path.parent.parent / "tokenizer.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, SINGLE, device)
    checkpoint.load(path, checkpoint.collect(model))
    ids = sample(
        lambda tokens, position: model.logits(model(tokens)[:, position])[0],
        tokenizer.encode(options["prompt"]) or [tokenizer.end_of_text],
        int(options["tokens"]),
        max_length=config.data.sequence_length,
        temperature=float(options["temperature"]),
        top_k=int(options["top_k"]) if options["top_k"] else None,
        top_p=float(options["top_p"]) if options["top_p"] else None,
        seed=int(options["seed"]),
        device=device,
        n_ids=tokenizer.size,
    )
    return tokenizer.decode(ids)


def find_checkpoint(folder: Path) -> Path:
    """`folder` itself when it is a checkpoint, else the newest valid one of that run."""
    if (folder / "manifest.json").is_file():
        checkpoint.verify(folder)
        return folder
    if not folder.is_dir():
        raise ConfigError(f"run={folder} is not a folder: take the one that train.sh printed")
    found = checkpoint.find_latest(folder / "checkpoints")
    if found is None:
        raise ConfigError(f"run={folder} holds no checkpoint yet")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
