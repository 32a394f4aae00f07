"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with weight decay on matrices only."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from flashtrain.config import ModelConfig, Moments, OptimizerConfig
from flashtrain.model.parametrization import rate_ratio
from flashtrain.optim.adamw_kernel import KernelAdamW


def build_adamw(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    model: ModelConfig,
    ours: bool = True,
) -> AdamW:
    """AdamW over the model's parameters by name, on CUDA in fused kernels.

    ours: of adamw_kernel.py, which bf16 moments need anyhow; false: of PyTorch's.

    Decay pulls weights of products and the token embedding to zero. Norm weights and biases have a
    natural scale of their own, and a position table is read row by row at every step, so neither
    decays.

    A group's "lr_ratio" multiplies the learning rate of every step (model/parametrization.py).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = parameter.dim() >= 2 and not name.startswith("position.")
        groups.setdefault((decays, rate_ratio(name, model)), []).append(parameter)
    on_gpu = all(p.is_cuda for p in parameters.values())
    kind: Any = AdamW
    if config.moments is Moments.bf16:
        kind = partial(KernelAdamW, moments=torch.bfloat16)
    elif on_gpu and ours:
        kind = partial(KernelAdamW, moments=torch.float32)
    optimizer: AdamW = kind(
        [
            {"params": own, "lr_ratio": ratio, "weight_decay": config.weight_decay / ratio * decays}
            for (decays, ratio), own in sorted(groups.items(), reverse=True)
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=on_gpu or None,
        capturable=on_gpu,
    )
    if on_gpu:
        device = next(iter(parameters.values())).device
        for group in optimizer.param_groups:  # read by the kernels: a CUDA graph sees it change
            group["lr"] = torch.full((), config.lr * group["lr_ratio"], device=device)
        # torch warns of steps outside of a graph; the fused kernels are the same there
        optimizer._warned_capturable_if_run_uncaptured = True
    optimizer.register_step_post_hook(_mark_changed)
    return optimizer


def _mark_changed(optimizer: Optimizer, *_: object) -> None:
    """Raise the version number of all parameters: fused kernels write and leave it as it was."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])
