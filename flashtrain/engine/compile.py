"""`torch.compile` where it pays: block by block."""

import torch

from flashtrain.model.gpt import GPT

GRAPHS = 64


def compile_blocks(model: GPT) -> None:
    """Compile each block in place; one graph serves all layers, so start-up does not grow with
    depth. After `recompute_blocks`."""
    # a graph for each length of data.ramp, with gradients and without; past its limit of 8 PyTorch
    # would run a block uncompiled from then on
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in model.blocks:
        # its forward alone: FSDP's hooks, which __call__ runs around it, are not traceable, and
        # `Module.compile` gives up on a forward that was wrapped (torch 2.13), without a word
        block.forward = torch.compile(block.forward, dynamic=False)
