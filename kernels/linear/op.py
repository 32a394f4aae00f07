"""Linear layers with the norm before and the stream after, as differentiable ops; MLPs: mlp.py.

    linear          stream + x W^T + b
    norm_linear     norm(x) W^T + b, and x, which goes on as the residual stream

What they keep for backward is the stream and the results of products: a norm's output is written
again by the kernel that differentiates the norm. Gradients of large weights leave their products
in the weights' dtype, fp32 for master weights, and are never rounded on the way (tiles.py).

Dims: N tokens, K input features, F output features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear import products, reference
from kernels.linear.products import BACKENDS, resolve
from kernels.norm import add_norm
from kernels.norm import op as norm
from kernels.norm.tiles import LONGEST


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stream: Tensor | None = None,
    *,
    remakes: bool = False,
    backend: str = "auto",
) -> Tensor:
    """stream + x weight^T + bias [.., F] in x's dtype, to which the weight is cast.

    Args:
        x: [.., K]; weight: [F, K]; bias: [F] or None; stream: [.., F] in x's dtype, or None.
        remakes: cast the weight once more in backward, where the cast one is kept otherwise.
        backend: cublaslt (passes over memory in Triton, products with epilogues by cuBLASLt),
            triton (products by PyTorch), torch (all by PyTorch); auto is cublaslt on Hopper, triton
            on other GPUs, both for 16 bits, torch elsewhere.

    Raises:
        ValueError: arguments that make no sense.
    """
    check(x.shape[-1], backend, weight=weight, bias=bias)
    rows = x.reshape(-1, x.shape[-1])
    if stream is not None:
        if stream.shape != (*x.shape[:-1], weight.shape[0]) or stream.dtype != x.dtype:
            raise ValueError(
                f"stream is {stream.dtype} {list(stream.shape)}: it must be {x.dtype} "
                f"{[*x.shape[:-1], weight.shape[0]]}"
            )
        stream = stream.reshape(-1, weight.shape[0])
    y: Tensor = _Linear.apply(rows, weight, bias, stream, remakes, resolve(x, backend))
    return y.view(*x.shape[:-1], weight.shape[0])


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    centers: bool,
    remakes: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(norm(x) weight^T + bias [.., F], x [.., K]): what comes back along x in backward is added by
    the kernel that differentiates the norm.

    Args:
        norm_weight, norm_bias, eps, centers: as in `kernels.norm.add_norm`.
        x, weight, bias, remakes, backend: as in `linear`.

    Raises:
        ValueError: arguments that make no sense.
    """
    check(x.shape[-1], backend, weight=weight, bias=bias)
    backend = resolve(x, backend)
    if backend == "torch" or x.shape[-1] > LONGEST:
        y, x = add_norm(x, None, norm_weight, norm_bias, eps=eps, centers=centers)
        return linear(y, weight, bias, remakes=remakes, backend=backend), x
    y, rows = _NormLinear.apply(
        x.reshape(-1, x.shape[-1]), norm_weight, norm_bias, weight, bias, eps, centers, remakes,
        backend,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0]), rows.view(x.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None,
        remakes: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        cast, bias16 = cast_for(x, weight, bias, backend)
        ctx.save_for_backward(x, weight if remakes else cast)
        ctx.dtypes, ctx.backend = dtypes_of(weight, bias), backend
        if stream is None:
            return F.linear(x, cast, bias16)
        return products.add_product(x, cast, bias16, stream, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, *needs, needs_stream = ctx.needs_input_grad[:4]
        of_weight, of_bias = wanted(ctx.dtypes, needs)
        dx = dy @ again(x, weight, ctx.backend) if needs_x else None
        dw, db = parameter_gradients(dy, x, of_weight, of_bias, ctx.backend)
        return dx, dw, db, dy if needs_stream else None, None, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor,
        bias: Tensor | None, eps: float, centers: bool, remakes: bool, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, _, mean, rstd = norm.forward(x, None, norm_weight, norm_bias, eps, centers)
        cast, bias16 = cast_for(x, weight, bias, backend)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight if remakes else cast)
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.centers, ctx.backend = dtypes_of(weight, bias), centers, backend
        return F.linear(y, cast, bias16), x

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        rest = [None] * 4
        if dz is None:  # only the stream went on
            return ds, None, None, None, None, *rest
        of_weight, of_bias = wanted(ctx.dtypes, ctx.needs_input_grad[3:5])
        dy = dz @ again(x, weight, ctx.backend)
        dx, total, y = norm.backward(
            dy, ds, x, norm_weight, norm_bias, mean, rstd, ctx.centers, of_weight is not None, False
        )
        dw, db = parameter_gradients(dz, y, of_weight, of_bias, ctx.backend)
        return dx, total[0], None if norm_bias is None else total[1], dw, db, *rest


def parameter_gradients(
    dy: Tensor,
    x: Tensor,
    of_weight: torch.dtype | None,
    of_bias: torch.dtype | None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """dW = dy^T x [F, K] and db = the sum of dy [F], each in its dtype; None: not wanted.

    Also for who computes them apart from the rest of backward. dy [N, F], x [N, K].
    """
    backend = resolve(dy, backend)
    dw = db = None
    if of_weight is not None:
        dw = products.weight_gradient(dy, x, of_weight, backend)
    if of_bias is not None:
        sums = reference.column_sums if backend == "torch" else products.column_sums
        db = sums(dy, of_bias)
    return dw, db


def cast_for(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in x's dtype."""
    if backend == "torch" or weight.dtype == x.dtype:
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    cast, bias16 = products.cast(weight, bias, x.dtype, False)
    return cast, None if bias is None else bias16


def again(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """What backward multiplies with: a kept weight that was not cast is cast now."""
    if backend == "torch" or weight.dtype == x.dtype:
        return weight.to(x.dtype)
    return products.cast(weight, None, x.dtype, True)[0]


def dtypes_of(*parameters: Tensor | None) -> list[torch.dtype | None]:
    return [None if parameter is None else parameter.dtype for parameter in parameters]


def wanted(dtypes: list[Any], needs: Any) -> list[Any]:
    """The dtypes of those gradients that are needed, None for the others."""
    return [dtype if need else None for dtype, need in zip(dtypes, needs, strict=True)]


def check(features: int, backend: str, **parameters: Tensor | None) -> None:
    """Sizes that fit together; the names of `parameters` are those of the caller."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.dim() == 2:
            if parameter.shape[1] != features:
                raise ValueError(
                    f"{name} {list(parameter.shape)} takes {parameter.shape[1]} features, and gets "
                    f"{features}"
                )
            features = parameter.shape[0]
        elif parameter.shape != (features,):
            raise ValueError(f"{name} {list(parameter.shape)} must be [{features}]")
