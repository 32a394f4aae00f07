"""The casts in plain PyTorch: what they mean, and the `torch` backend.

With A the largest absolute value of what shares a scale, and `top` the largest fp8 number:

    q = fp8(x (top / A))        scale = A / top        x is about q scale

Rounding is to nearest, ties to even. |x| top / A is at most `top` but for a rounding of fp32, which
is far from the middle between `top` and what would come after it, so nothing has to be clamped.
An A below FLOOR counts as FLOOR: zeros stay zeros, and top / A stays finite. An A that is infinite
or NaN makes x NaN wherever it is not finite, and the scale infinite or NaN, so that a product with
it is not finite either.
"""

import math

import torch
from torch import Tensor

FLOOR = 2.0**-100
ROOT, CUBE = math.sqrt(2 / math.pi), 0.044715  # of gelu's tanh form


def activated(z: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """What an MLP makes of its first product: a = gelu(z) [N, F] in the tanh form, or, of z = [g |
    u] [N, 2 F], silu(g) u; and the derivative of a by each number of z. fp32 (fp64 of fp64)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if not gated:
        # by the sigmoid that gelu is z times of: PyTorch's gelu' has no digits left where it is
        # near 0
        s = torch.sigmoid(2 * ROOT * (z + CUBE * z**3))
        return z * s, s * (1 + 2 * ROOT * (z + 3 * CUBE * z**3) * (1 - s))
    g, u = z.chunk(2, -1)
    s = torch.sigmoid(g)
    return g * s * u, torch.cat([u * (s + g * s * (1 - s)), g * s], -1)


def gradient(z: Tensor, d: Tensor, gated: bool) -> Tensor:
    """That of z where d [N, F] is that of a; fp32 (fp64 of fp64)."""
    _, slopes = activated(z, gated)
    d = d.to(slopes.dtype)
    return slopes * (torch.cat([d, d], -1) if gated else d)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centers: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """norm(x) [N, D] in x's dtype; mean ([0] for RMSNorm) and rstd [N]; 0-dim what no number of it
    exceeds, sqrt(D) max |weight| + max |bias|, and no row's length. All but the first in fp32."""
    wide = x.to(torch.float32)
    mean = wide.mean(1) if centers else wide.new_empty(0)
    h = wide - mean[:, None] if centers else wide
    rstd = (h.square().mean(1) + eps).rsqrt()
    y = h * rstd[:, None] * weight.to(torch.float32)
    bound = length = absolute_maximum(weight) * math.sqrt(x.size(1))
    if bias is not None:
        bias = bias.to(torch.float32)
        y, bound, length = y + bias, bound + absolute_maximum(bias), length + bias.norm()
    return y.to(x.dtype), mean, rstd, bound, length


def absolute_maximum(x: Tensor) -> Tensor:
    """max |x| of all x, 0-dim fp32; NaN where x has one."""
    return x.abs().amax().to(torch.float32)


def tensorwise(x: Tensor, maximum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x of any shape -> q of its shape, scale 0-dim fp32; `maximum` is `absolute_maximum(x)`."""
    return _cast(x, maximum, dtype)


def rowwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> q [M, K], scale [M, 1] fp32: every row has its own."""
    return _cast(x, x.abs().amax(1, keepdim=True).to(torch.float32), dtype)


def columnwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`rowwise(x.t())`: x [M, K] -> q [K, M] contiguous, scale [K, 1]."""
    q, scale = _cast(x, x.abs().amax(0, keepdim=True).to(torch.float32), dtype)
    return q.t().contiguous(), scale.t().contiguous()


def _cast(x: Tensor, maximum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    maximum = maximum.clamp(min=FLOOR)  # which lets NaN pass
    # a tensor: PyTorch divides by a number through its reciprocal, a rounding more than the kernels
    top = torch.full_like(maximum, torch.finfo(dtype).max)
    return (x.to(torch.float32) * (top / maximum)).to(dtype), maximum / top
