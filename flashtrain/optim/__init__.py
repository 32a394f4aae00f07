"""Optimizers over the parameters that an engine holds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from flashtrain.config import Config, OptimizerKind
from flashtrain.model.dtypes import DTYPES
from flashtrain.optim.adamw import build_adamw
from flashtrain.optim.muon import Muon
from flashtrain.parallel.gradients import clip_by_norm_
from flashtrain.parallel.mesh import Mesh


def on_device(optimizer: Optimizer) -> bool:
    """Whether a step asks the host for nothing: the fused AdamW, ours, and Muon beside these."""
    if isinstance(optimizer, Muon):
        return optimizer.on_device
    return isinstance(optimizer, AdamW) and bool(optimizer.defaults["fused"])


def step_unless_bad(optimizer: Optimizer, norm: Tensor, clip_norm: float | None = None) -> None:
    """One step, or none where the norm of the whole gradient is not finite.

    Then parameters, moments and step counts stay as they are, to the last bit. The fused AdamW
    and Muon on GPUs look at the norm on the device; for other optimizers the host waits for it.

    clip_norm: the gradient counts times min(1, clip_norm / (norm + 1e-6)), as in
        `torch.nn.utils.clip_grad_norm_`; for the fused AdamW within its own pass.
    """
    if on_device(optimizer):
        optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        scale = None if clip_norm is None else ((norm + 1e-6) / clip_norm).clamp(min=1.0)
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        return
    if clip_norm is not None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        clip_by_norm_(parameters, norm, clip_norm)
    if bool(norm.isfinite()):
        optimizer.step()


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: Config, mesh: Mesh
) -> Optimizer:
    """What `optimizer.name` names. Collective over the mesh for Muon."""
    if config.optimizer.name is OptimizerKind.adamw:
        return build_adamw(parameters, config.optimizer, config.model)
    dtype = DTYPES[config.precision.compute]
    return Muon(parameters, config.optimizer, config.model, mesh, dtype)
