"""Activation checkpointing: what a function keeps for backward is made again there instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Compiled by an older torch, what our autograd functions keep (kernels/linear, kernels/attention)
# is kept all the same, unless a policy says of each operation that it is not: torch 2.11, one GELU
# block of width 128, 192 tokens, 1,040,320 bytes with no policy, 54,208 with one, as torch 2.13
# keeps without
NEEDS_POLICY = torch.__version__ < torch.torch_version.TorchVersion("2.13")


def make_again(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """function(*arguments), keeping the arguments alone for backward, which runs it once more.

    keywords: those of `torch.utils.checkpoint.checkpoint`. No random number is drawn again.
    """
    if NEEDS_POLICY and "context_fn" not in keywords and torch.compiler.is_compiling():
        keywords["context_fn"] = _nothing_is_kept
    return checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords
    )


def _nothing_is_kept() -> Any:
    return create_selective_checkpoint_contexts(_must_recompute)


def _must_recompute(*_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE
