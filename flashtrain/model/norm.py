"""LayerNorm and RMSNorm, computed in the dtype of their weight (fp32), returned in x's dtype.

The casts stand in the graph, so the compiler fuses them with the reduction and keeps only x in its
own dtype for the backward pass.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import ModelConfig, Norm


class LayerNorm(nn.Module):
    """Ba et al. 2016, arXiv:1607.06450, over the last dimension."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        y = F.layer_norm(x.to(weight.dtype), weight.shape, weight, self.bias, self.eps)
        return y.to(x.dtype)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(x.dtype)


def build_norm(model: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm of the residual stream that the config names."""
    if model.norm is Norm.rmsnorm:
        return RMSNorm(model.d_model, model.norm_eps)
    return LayerNorm(model.d_model, model.norm_eps, model.bias)
