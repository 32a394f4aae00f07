"""Checkpoints that any layout of GPUs can load, and of which no damaged byte is ever used."""

from collections.abc import Collection
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from flashtrain.checkpoint.background import Saved, Saver, own_peers
from flashtrain.checkpoint.integrity import CheckpointError, read_manifest
from flashtrain.checkpoint.peers import Peers
from flashtrain.checkpoint.retention import EVALUATION, Retention
from flashtrain.checkpoint.shelf import find_latest, locate, refuse_other_model, verify
from flashtrain.checkpoint.state import (
    State,
    adam_state,
    collect,
    collect_parameters,
    prepare,
    refuse_buffers,
    rng_state,
    set_rng_state,
)
from flashtrain.checkpoint.store import load, read_meta, read_rng, save

__all__ = [
    "EVALUATION",
    "CheckpointError",
    "Peers",
    "Retention",
    "Saved",
    "Saver",
    "State",
    "adam_state",
    "collect",
    "collect_parameters",
    "find_latest",
    "load",
    "locate",
    "own_peers",
    "prepare",
    "read_meta",
    "read_rng",
    "refuse_buffers",
    "refuse_other_model",
    "restore",
    "rng_state",
    "save",
    "saved_names",
    "set_rng_state",
    "verify",
]


def saved_names(path: Path) -> Collection[str]:
    """The logical names of the tensors in a checkpoint."""
    return read_manifest(path).tensors.keys()


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill a model and its optimizer, fresh or used, in place; bit for bit what was saved."""
    prepare(dict(model.named_parameters()), optimizer, saved_names(path))
    load(path, collect(model, optimizer))
