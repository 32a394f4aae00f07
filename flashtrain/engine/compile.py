"""`torch.compile` where it pays: block by block."""

import torch
from torch.distributed.fsdp import FSDPModule

from flashtrain.model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Compile each block in place; one graph serves all layers, so start-up does not grow with
    depth."""
    for block in model.blocks:
        if isinstance(block, FSDPModule):
            # its forward alone: FSDP's hooks, which __call__ runs around it, are not traceable
            block.forward = torch.compile(block.forward, dynamic=False)
        else:
            block.compile(dynamic=False)
