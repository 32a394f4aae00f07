"""LayerNorm and RMSNorm, computed in fp32 at least and returned in x's dtype, and the residual
stream they are taken of: kernels/norm does both in one pass each way.
"""

import torch
from torch import Tensor, nn

from flashtrain.config import ModelConfig, Norm
from kernels.norm import add_norm


class StreamNorm(nn.Module):
    """Over the last dimension. `centers`: LayerNorm (Ba et al. 2016, arXiv:1607.06450), else
    RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(
        self, size: int, eps: float, *, centers: bool, bias: bool = False, backend: str = "auto"
    ) -> None:
        """backend: of kernels/norm; with torch the compiler fuses it with what is around."""
        super().__init__()
        self.eps, self.centers, self.backend = eps, centers, backend
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + branch, and x + branch (branch None: x), which goes on as the stream."""
        return add_norm(
            x, branch, self.weight, self.bias,
            eps=self.eps, centers=self.centers, backend=self.backend,
        )  # fmt: skip


def head_norm(model: ModelConfig) -> StreamNorm:
    """An RMSNorm of the heads of q or k, between operations that the compiler joins it with."""
    assert model.head_size is not None
    return StreamNorm(model.head_size, model.norm_eps, centers=False, backend="torch")


def build_norm(model: ModelConfig) -> StreamNorm:
    """The norm of the residual stream that the config names."""
    centers = model.norm is Norm.layernorm
    return StreamNorm(model.d_model, model.norm_eps, centers=centers, bias=centers and model.bias)
