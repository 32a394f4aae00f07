"""The matrix product of every layer, with the norm before it and the stream after it: fp32 master
weights, activations decide the compute dtype.

Layers that hold all of their weight and multiply in the compute dtype are *plain*; kernels/linear
then computes norm, product and sum as one operation. In fp8 with a scale a tensor it is one, too
(float8_product.py). Others (tensor-parallel, a scale a row) run one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.model.float8_product import Float8Product
from flashtrain.model.norm import StreamNorm
from kernels.linear import linear, norm_linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [.., in], weight [out, in], bias [out] -> [.., out]`, all in x's dtype.

    What a layer multiplies with; float8.py puts another in its place.
    """
    return linear(x, weight, bias)


class Linear(nn.Module):
    """`x [.., in] -> x weight^T + bias [.., out]`, in x's dtype.

    The weight is cast on use, so bf16 training needs no autocast and the optimizer sees fp32
    gradients. Values come from `init_weights`: the module may be built on the meta device.

    fuses: whether it may be computed in one with what is around it; then its own forward is not
        called. remakes: make again in backward what a pass over memory makes (kernels/linear).
    """

    fuses, remakes = True, False

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

    def arrive(self, x: Tensor) -> Tensor:
        """What its product sees of x, and `leave` what becomes of that: here nothing else."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


def is_plain(layer: Any) -> bool:
    return getattr(layer, "product", None) is product and layer.fuses


def is_float8(layer: Any) -> bool:
    """Whether it is a whole layer in fp8, with a scale a tensor, that fuses."""
    made = isinstance(layer, Linear) and layer.fuses and isinstance(layer.product, Float8Product)
    return made and not layer.product.recipe.rowwise


def behind_norm(
    layer: Any, norm: StreamNorm, x: Tensor, branch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """layer(norm(x + branch)), and x + branch, the stream (branch None: x)."""
    if branch is None and is_plain(layer):
        return norm_linear(
            x, norm.weight, norm.bias, layer.weight, layer.bias,
            eps=norm.eps, centers=norm.centers, remakes=layer.remakes,
        )  # fmt: skip
    if branch is None and is_float8(layer):
        both: tuple[Tensor, Tensor] = layer.product.behind_norm(norm, x, layer.weight, layer.bias)
        return both
    normed, x = norm.add(x, branch)
    y: Tensor = layer(normed)
    return y, x


def onto_stream(layer: Any, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | None]:
    """stream + layer(x), as their sum and None or still as two."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, stream, remakes=layer.remakes), None
    if is_float8(layer):
        return layer.product(x, layer.weight, layer.bias, stream), None
    return stream, layer(x)
