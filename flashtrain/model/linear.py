"""The matrix product of every layer: fp32 master weights, activations decide the compute dtype."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.linear import linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [.., in], weight [out, in], bias [out] -> [.., out]`, all in x's dtype.

    What a layer multiplies with; `flashtrain/model/float8.py` puts another in its place.
    """
    return linear(x, weight, bias)


class Linear(nn.Module):
    """`x [.., in] -> x weight^T + bias [.., out]`, in x's dtype.

    The weight is cast on use, so bf16 training needs no autocast and the optimizer sees fp32
    gradients. Values come from `init_weights`: the module may be built on the meta device.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32))
        self.product: Product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"
