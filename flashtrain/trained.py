"""A model as a run left it, opened again to be used: scripts/generate.py, scripts/evaluate.py."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.checkpoint import Peers
from flashtrain.compose import from_dict
from flashtrain.config import Config
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer
from flashtrain.engine.decoder import cast_weights
from flashtrain.model.gpt import GPT
from flashtrain.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Trained:
    config: Config
    tokenizer: Tokenizer
    model: GPT  # this rank's shard, its matrices in the compute dtype
    path: Path  # the checkpoint
    step: int


def open_trained(
    run: Path, device: torch.device, tensor: Axis = SINGLE, peers: Peers | None = None
) -> Trained:
    """The newest valid checkpoint of a run folder, or a checkpoint itself; collective.

    Raises CheckpointError where there is none.
    """
    path = checkpoint.locate(run, peers or Peers(None))
    meta = checkpoint.read_meta(path)
    config = from_dict(meta["config"])
    tokenizer = load_tokenizer(path.parent.parent / "tokenizer.json")
    model = build_model(config, tensor, device)
    checkpoint.load(path, checkpoint.collect(model))
    cast_weights(model)
    return Trained(config, tokenizer, model, path, int(meta.get("step", 0)))
