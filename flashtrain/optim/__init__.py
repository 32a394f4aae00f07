"""Optimizers over the parameters that an engine holds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from flashtrain.config import Config, OptimizerKind
from flashtrain.model.dtypes import DTYPES
from flashtrain.optim.adamw import build_adamw
from flashtrain.optim.muon import Muon
from flashtrain.parallel.mesh import Mesh


def step_unless_bad(optimizer: Optimizer, norm: Tensor) -> None:
    """One step, or none where the norm of the whole gradient is not finite.

    Then parameters, moments and step counts stay as they are, to the last bit. The fused AdamW
    looks at the norm on the device; for other optimizers the host waits for it.
    """
    if isinstance(optimizer, AdamW) and optimizer.defaults["fused"]:
        optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(norm.isfinite()):
        optimizer.step()


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: Config, mesh: Mesh
) -> Optimizer:
    """What `optimizer.name` names. Collective over the mesh for Muon."""
    if config.optimizer.name is OptimizerKind.adamw:
        return build_adamw(parameters, config.optimizer, config.model)
    dtype = DTYPES[config.precision.compute]
    return Muon(parameters, config.optimizer, config.model, mesh, dtype)
