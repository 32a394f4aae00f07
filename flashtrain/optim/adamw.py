"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with weight decay on matrices only."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import AdamW

from flashtrain.config import OptimizerConfig


def build_adamw(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW over the model's parameters by name; on CUDA one fused kernel per group.

    Decay pulls weights of products and the token embedding to zero. Norm weights and biases have a
    natural scale of their own, and a position table is read row by row at every step, so neither
    decays.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        decays = parameter.dim() >= 2 and not name.startswith("position.")
        (matrices if decays else rest).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.is_cuda for p in matrices) or None,
    )
