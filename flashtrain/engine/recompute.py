"""Activation checkpointing: forget a block's activations in forward, make them again in backward.

`full` keeps a block's input only. `selective` also keeps what is dear to make again for its size:
attention outputs and every second matrix product (Korthikanti et al. 2022, arXiv:2205.05198, with
the per-operator choice of PyTorch's selective checkpointing).
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from flashtrain.config import Recompute
from flashtrain.model.gpt import GPT

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def recompute_blocks(model: GPT, kind: Recompute) -> None:
    """Wrap each block's forward in place; parameter names stay as they are. Before `compile`."""
    keywords: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind is Recompute.selective:
        keywords["context_fn"] = _selective_contexts
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, **keywords)


def _selective_contexts() -> Any:
    products = {"forward": 0, "recompute": 0}

    def policy(context: Any, operator: Any, *_args: Any, **_keywords: Any) -> CheckpointPolicy:
        if operator in PRODUCTS:
            stage = "recompute" if context.is_recompute else "forward"
            products[stage] += 1
            keep = products[stage] % 2 == 1
        else:
            keep = operator.namespace == "flashtrain" or "attention" in operator.name()
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
