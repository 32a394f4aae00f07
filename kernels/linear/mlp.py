"""MLPs with the norm before and the stream after, as differentiable ops.

    norm_gelu_mlp     x + gelu(norm(x) U^T + u) D^T + d
    norm_swiglu_mlp   x + swiglu(norm(x) U^T + u) D^T + d, with swiglu of [g | u] = silu(g) u
    swiglu            alone, for layers that multiply in another way

As in op.py, what is kept for backward is the stream and the results of products.

Dims: N tokens, K features of the stream, F hidden features (gate_up gives 2 F).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear import products, reference
from kernels.linear.op import (
    again,
    cast_for,
    check,
    dtypes_of,
    linear,
    parameter_gradients,
    wanted,
)
from kernels.linear.products import resolve
from kernels.norm import add_norm
from kernels.norm import op as norm
from kernels.norm.tiles import LONGEST


def norm_gelu_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    eps: float,
    centers: bool,
    remakes: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x + gelu(norm(x) up^T + up_bias) down^T + down_bias [.., K], GELU in its tanh form.

    Args:
        x: [.., K]; up: [F, K]; down: [K, F]; the biases: [F] and [K], or None.
        norm_weight, norm_bias, eps, centers: as in `kernels.norm.add_norm`.
        remakes: GELU's output and the cast weights are made again in backward, where otherwise they
            are kept: [N, F], half of what this keeps.
        backend: as in `linear`.

    Raises:
        ValueError: arguments that make no sense.
    """
    check(x.shape[-1], backend, up=up, up_bias=up_bias, down=down, down_bias=down_bias)
    layers = (up, up_bias, down, down_bias)
    return _norm_mlp(x, norm_weight, norm_bias, layers, eps, centers, remakes, False, backend)


def norm_swiglu_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    eps: float,
    centers: bool,
    remakes: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x + swiglu(norm(x) gate_up^T + gate_up_bias) down^T + down_bias [.., K], where swiglu of
    [g | u] is silu(g) u (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [.., K]; gate_up: [2 F, K]; down: [K, F]; the biases: [2 F] and [K], or None.
        norm_weight, norm_bias, eps, centers: as in `kernels.norm.add_norm`.
        remakes: SwiGLU's output and the cast weights are made again in backward, where otherwise
            they are kept: [N, F], a third of what this keeps.
        backend: as in `linear`.

    Raises:
        ValueError: arguments that make no sense.
    """
    check(x.shape[-1], backend, gate_up=gate_up, gate_up_bias=gate_up_bias)
    if gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(
            f"gate_up {list(gate_up.shape)} must give twice the {down.shape[1]} features that down "
            f"{list(down.shape)} takes"
        )
    check(down.shape[1], backend, down=down, down_bias=down_bias)
    layers = (gate_up, gate_up_bias, down, down_bias)
    return _norm_mlp(x, norm_weight, norm_bias, layers, eps, centers, remakes, True, backend)


def swiglu(z: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(g) u [.., F] of z = [g | u] [.., 2 F]. backend: as in `linear`.

    Raises:
        ValueError: an odd number of features, or no such backend.
    """
    check(z.shape[-1], backend)
    if z.shape[-1] % 2:
        raise ValueError(f"{z.shape[-1]} features of z are not two halves")
    if resolve(z, backend) == "torch":
        return reference.swiglu(z)
    a: Tensor = _Swiglu.apply(z)
    return a


def _norm_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, layers: tuple[Tensor | None, ...],
    eps: float, centers: bool, remakes: bool, gated: bool, backend: str,
) -> Tensor:  # fmt: skip
    up, up_bias, down, down_bias = layers
    assert up is not None and down is not None
    if down.shape[0] != x.shape[-1]:
        raise ValueError(f"down {list(down.shape)} must give back the {x.shape[-1]} features of x")
    backend = resolve(x, backend)
    if backend == "torch" or x.shape[-1] > LONGEST:
        y, x = add_norm(x, None, norm_weight, norm_bias, eps=eps, centers=centers)
        z = linear(y, up, up_bias, backend=backend)
        a = swiglu(z, backend=backend) if gated else F.gelu(z, approximate="tanh")
        return linear(a, down, down_bias, x, backend=backend)
    made: Tensor = _NormMLP.apply(
        x.reshape(-1, x.shape[-1]), norm_weight, norm_bias, up, up_bias, down, down_bias,
        eps, centers, remakes, gated, backend,
    )  # fmt: skip
    return made.view(x.shape)


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, up: Tensor,
        up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, eps: float, centers: bool,
        remakes: bool, gated: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        y, _, mean, rstd = norm.forward(x, None, norm_weight, norm_bias, eps, centers)
        up16, up_bias16 = cast_for(x, up, up_bias, backend)
        down16, down_bias16 = cast_for(x, down, down_bias, backend)
        if gated:
            z = F.linear(y, up16, up_bias16)
            a = reference.swiglu(z)  # a compiler's kernel for it is as fast as memory
        else:
            z, a = products.gelu_product(y, up16, up_bias16, backend)
        kept = (up, down) if remakes else (up16, down16, a)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, z, *kept)
        ctx.dtypes = dtypes_of(up, up_bias, down, down_bias)
        ctx.centers, ctx.remakes, ctx.gated, ctx.backend = centers, remakes, gated, backend
        return products.add_product(a, down16, down_bias16, x, backend)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, z, up, down, *kept = ctx.saved_tensors
        of_up, of_up_bias, of_down, of_down_bias = wanted(ctx.dtypes, ctx.needs_input_grad[3:7])
        down16, biased = again(x, down, ctx.backend), of_up_bias is not None
        if ctx.gated:
            dz, sums, a = products.swiglu_gradient(dx @ down16, z, biased, ctx.remakes)
        else:
            dz, sums, a = products.gelu_gradient(dx, down16, z, biased, ctx.remakes)
        d_down, _ = parameter_gradients(
            dx, a if ctx.remakes else kept[0], of_down, None, ctx.backend
        )
        dx, total, y = norm.backward(
            dz @ again(x, up, ctx.backend), dx, x, norm_weight, norm_bias, mean, rstd,
            ctx.centers, of_up is not None, of_down_bias is not None,
        )  # fmt: skip
        d_up, _ = parameter_gradients(dz, y, of_up, None, ctx.backend)
        d_norm_bias = None if norm_bias is None else total[1]
        d_up_bias = None if of_up_bias is None else sums.to(of_up_bias)
        # dx came along the stream: the norm's kernel has read it anyway
        d_down_bias = None if of_down_bias is None else total[-1].to(of_down_bias)
        return dx, total[0], d_norm_bias, d_up, d_up_bias, d_down, d_down_bias, *[None] * 5


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return reference.swiglu(z)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        rows = d.reshape(-1, d.shape[-1]), z.reshape(-1, z.shape[-1])
        dz, _, _ = products.swiglu_gradient(*rows, False, False)
        return dz.view_as(z)
