"""Optimizers over the parameters that an engine holds."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from flashtrain.config import Config, OptimizerKind
from flashtrain.model.dtypes import DTYPES
from flashtrain.optim.adamw import build_adamw
from flashtrain.optim.muon import Muon
from flashtrain.parallel.mesh import Mesh


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: Config, mesh: Mesh
) -> Optimizer:
    """What `optimizer.name` names. Collective over the mesh for Muon."""
    if config.optimizer.name is OptimizerKind.adamw:
        return build_adamw(parameters, config.optimizer)
    dtype = DTYPES[config.precision.compute]
    return Muon(parameters, config.optimizer, config.model, mesh, dtype)
