"""What the products and passes compute, in plain PyTorch: their meaning, and what runs where
nothing faster does.

Dims: N tokens, K input features, F output features (of an MLP: hidden), E features after it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_product(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    """stream + x W^T + b. x [N, K], W [F, K], b [F], stream [N, F]; [N, F]."""
    return stream + F.linear(x, weight, bias)


def add_float8_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, stream: Tensor,
    fast: bool,
) -> Tensor:  # fmt: skip
    """stream + a_scale b_scale (a b^T) + bias. a [N, K] and b [F, K] in fp8, their scales 0-dim,
    bias [F], stream [N, F]; [N, F]. fast: keep fewer bits of partial sums, where a GPU can."""
    y = torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=stream.dtype,
        use_fast_accum=fast,
    )  # fmt: skip
    return stream + y


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = x W^T + b and a = gelu(z) in its tanh form. x [N, K], W [F, K], b [F]; [N, F] both."""
    z = F.linear(x, weight, bias)
    return z, F.gelu(z, approximate="tanh")


def gelu_gradient(dy: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    """dz = (dy W) gelu'(z). dy [N, E], W [E, F], z [N, F]; [N, F]."""
    dz: Tensor = torch.ops.aten.gelu_backward(dy @ weight, z, approximate="tanh")
    return dz


def swiglu(z: Tensor) -> Tensor:
    """silu(g) u [.., F] of z = [g | u] [.., 2 F]."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_gradient(d: Tensor, z: Tensor) -> Tensor:
    """dz [.., 2 F] where d [.., F] is the gradient of swiglu(z)."""
    gate, up = z.chunk(2, dim=-1)
    d_gate: Tensor = torch.ops.aten.silu_backward(d * up, gate)
    return torch.cat((d_gate, d * F.silu(gate)), dim=-1)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dW = dy^T x [F, K] in dtype. dy [N, F], x [N, K]."""
    if dtype == dy.dtype:
        return dy.t() @ x
    if dy.is_cuda and dtype == torch.float32:
        return torch.mm(dy.t(), x, out_dtype=dtype)  # summed in fp32 and never rounded
    return dy.t().to(dtype) @ x.to(dtype)


def column_sums(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tokens [F] in dtype."""
    return dy.sum(0, dtype=dtype)
