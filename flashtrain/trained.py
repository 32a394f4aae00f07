"""A model as a run left it, opened again to be used: scripts/generate.py, scripts/evaluate.py."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.checkpoint import Peers
from flashtrain.compose import from_dict
from flashtrain.config import Config
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer
from flashtrain.engine.decoder import Decoder, cast_weights
from flashtrain.parallel.mesh import build_mesh


@dataclass(frozen=True)
class Trained:
    config: Config
    tokenizer: Tokenizer
    decoder: Decoder  # over all processes; matrices in the compute dtype
    peers: Peers  # all processes
    path: Path  # the checkpoint
    step: int


def join() -> torch.device:
    """This process's device; under torchrun, the process group of all of them."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpu = device if device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=gpu)
    return device


def open_trained(run: Path, device: torch.device) -> Trained:
    """The newest valid checkpoint of a run folder, or a checkpoint itself; collective.

    All processes share the model by tensor parallelism. Raises CheckpointError where there is none.
    """
    mesh = build_mesh(dist.get_world_size() if dist.is_initialized() else 1)
    peers = Peers(dist.group.WORLD if mesh.world_size > 1 else None)
    path = checkpoint.locate(run, peers)
    meta = checkpoint.read_meta(path)
    config = from_dict(meta["config"])
    tokenizer = load_tokenizer(path.parent.parent / "tokenizer.json")
    model = build_model(config, mesh.tensor, device)
    checkpoint.load(path, checkpoint.collect(model))
    cast_weights(model)
    decoder = Decoder(model, mesh.tensor)
    return Trained(config, tokenizer, decoder, peers, path, int(meta.get("step", 0)))
