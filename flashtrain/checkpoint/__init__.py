"""Checkpoints that any layout of GPUs can load, and of which no damaged byte is ever used."""

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from flashtrain.checkpoint.integrity import CheckpointError, read_manifest
from flashtrain.checkpoint.peers import Peers
from flashtrain.checkpoint.shelf import find_latest, verify
from flashtrain.checkpoint.state import State, collect, prepare, rng_state, set_rng_state
from flashtrain.checkpoint.store import load, read_meta, read_rng, save

__all__ = [
    "CheckpointError",
    "Peers",
    "State",
    "collect",
    "find_latest",
    "load",
    "prepare",
    "read_meta",
    "read_rng",
    "restore",
    "rng_state",
    "save",
    "set_rng_state",
    "verify",
]


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill a model and its optimizer, fresh or used, in place; bit for bit what was saved."""
    prepare(model, optimizer, read_manifest(path).tensors)
    load(path, collect(model, optimizer))
