"""Activation checkpointing: forget a block's activations in forward, make them again in backward.

`light` forgets what a pass over memory makes again: GELU's or SwiGLU's output, within a kernel that
runs anyhow, and weights in the compute dtype (kernels/linear); of MLPs in fp8 that output
(flashtrain/model/float8_mlp.py); of other layers that are not plain ones, nothing. `full` keeps a
block's input only. `selective` also keeps what is dear to make again for its size: attention
outputs and every second matrix product (Korthikanti et al. 2022, arXiv:2205.05198, with the
per-operator choice of PyTorch's selective checkpointing). The MLP alone may run chunk by chunk.
"""

import functools
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from flashtrain.config import Recompute
from flashtrain.model.attention import Attention
from flashtrain.model.checkpointing import make_again
from flashtrain.model.gpt import GPT
from flashtrain.model.linear import Linear
from flashtrain.model.mlp import MLP

# matrix products, and those with their transfers (flashtrain/parallel/overlap.py), by name: some
# are defined only where they are used
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "flashtrain::gather_linear",
    "flashtrain::linear_scatter",
    "symm_mem::fused_all_gather_matmul",
    "symm_mem::fused_matmul_reduce_scatter",
}


def recompute_blocks(model: GPT, kind: Recompute) -> None:
    """Wrap each block's forward in place; parameter names stay as they are. Before `compile`."""
    keywords = {"context_fn": _selective_contexts} if kind is Recompute.selective else {}
    layers: list[Any] = [layer for layer in model.blocks.modules() if hasattr(layer, "fuses")]
    if kind is Recompute.light:
        for layer in layers:
            if isinstance(layer, Linear):
                layer.remakes = True
        return
    for layer in layers if kind is Recompute.selective else ():
        layer.fuses = False  # each operation for itself, to be kept or not
    for block in model.blocks:
        attention = block.get_submodule("attention")
        assert isinstance(attention, Attention)
        # the first product of a block, which `selective` keeps, is that of q, k and v
        attention.keeps_product = kind is Recompute.selective
        block.forward = functools.partial(make_again, block.forward, **keywords)


def chunk_mlps(model: GPT, chunks: int) -> None:
    """Let each MLP see its tokens in `chunks` parts, in place (flashtrain/model/mlp.py)."""
    for block in model.blocks:
        mlp = block.get_submodule("mlp")
        assert isinstance(mlp, MLP)
        mlp.chunks = chunks


def _selective_contexts() -> Any:
    products = {"forward": 0, "recompute": 0}

    def policy(context: Any, operator: Any, *_args: Any, **_keywords: Any) -> CheckpointPolicy:
        if operator.name() in PRODUCTS:
            stage = "recompute" if context.is_recompute else "forward"
            products[stage] += 1
            keep = products[stage] % 2 == 1
        else:
            keep = operator.namespace == "flashtrain" or "attention" in operator.name()
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
