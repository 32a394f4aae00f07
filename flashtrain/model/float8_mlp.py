"""An MLP whose two products are in fp8 tensorwise, as one: what is between them is cast to fp8 as
it is computed (kernels/fp8_cast/mlp.py), where two layers of float8_product.py would write it in
bf16, read it for its maximum and read it for the cast.

Dims: M tokens, K features of the stream, F hidden features; z is [M, F], gated [M, 2 F].

    z = X U^T + u    a = gelu(z), or silu(g) v of z = [g | v]    Y = a D^T
    dD = dY^T a      da = dY D    dz = da a'(z)                  dX = dz U      dU = dz^T X

Kept for backward: X and a in fp8, transposed, and z in 16 bits, as of two layers. Where the first
layer `remakes` (trainer.recompute=light) a is cast from z once more, and not kept. Scales are of
largest numbers, but of bounds for dz and, behind a norm, for X and GELU's a.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.model.float8_product import Float8Product, Recipe, multiply, one_layout
from flashtrain.model.linear import Linear
from flashtrain.model.norm import StreamNorm
from kernels.fp8_cast import (
    E4M3,
    absolute_maximum,
    cast_gradient,
    cast_hidden,
    cast_hidden_gradient,
    cast_norm,
    cast_tensorwise,
    gradient_bound,
    hidden_bound,
    hidden_maxima,
    longest_row,
)
from kernels.norm import norm_gradient


def takes(up: Any, down: Any) -> bool:
    """Whether two layers can be one: both may, and are cast tensorwise."""
    return all(
        layer.fuses
        and isinstance(layer.product, Float8Product)
        and not layer.product.recipe.rowwise
        for layer in (up, down)
    ) and bool(up.weight.requires_grad == down.weight.requires_grad)


def float8_mlp(x: Tensor, up: Any, down: Any, *, gated: bool) -> Tensor:
    """down(gelu(up(x))) [.., K] of x [.., K] in x's dtype, or with `gated` down(silu(g) v) of up(x)
    = [g | v]. The layers are such as `takes` says, those of tensor ranks (parallel/layers.py) too.

    Raises ValueError for a number of tokens that fp8 products cannot take.
    """
    x = up.arrive(x)
    y: Tensor = down.leave(_run(x, None, up, down, None, gated))
    # in fp32, so that the bias' gradient is never rounded; a compiler fuses it with what comes next
    return y if down.bias is None else (y + down.bias).to(y.dtype)


def norm_float8_mlp(
    norm: StreamNorm, x: Tensor, up: Linear, down: Linear, *, gated: bool
) -> Tensor:
    """x + float8_mlp(norm(x)), of layers that hold all of their weights: norm(x) is cast as it is
    computed, the second product adds x."""
    return _run(x, norm, up, down, down.bias, gated)


def _run(
    x: Tensor, norm: StreamNorm | None, up: Any, down: Any, down_bias: Tensor | None, gated: bool
) -> Tensor:
    first, second = up.product, down.product
    assert isinstance(first, Float8Product) and isinstance(second, Float8Product)
    flat = x.reshape(-1, x.shape[-1])
    trains = first.trains(flat, up.weight)
    before = (None, None, 0.0, False) if norm is None else (
        norm.weight, norm.bias, norm.eps, norm.centers
    )  # fmt: skip
    reach = None
    if norm is not None and not gated:
        reach = first.reach
        if reach is None:
            reach = longest_row(up.weight.detach())
    y: Tensor = _MLP.apply(
        flat, *before, up.weight, up.bias, down.weight, down_bias,
        *first.cast(up.weight), first.columns, *second.cast(down.weight), second.columns,
        reach, gated, trains, first.recipe, getattr(up, "remakes", False),
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return y.view(x.shape)


class _MLP(torch.autograd.Function):
    """With a norm's weight: x + mlp(norm(x)); without: mlp(x). reach: of hidden_bound; None: z is
    read for its largest number."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
        centers: bool, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        up_rows: Tensor, up_scale: Tensor, up_columns: Tensor | None,
        down_rows: Tensor, down_scale: Tensor, down_columns: Tensor | None,
        reach: Tensor | None, gated: bool, trains: bool, recipe: Recipe, remakes: bool,
    ) -> Tensor:  # fmt: skip
        backend = recipe.backend
        normed: tuple[Tensor | None, ...] = (None,) * 5
        if norm_weight is None:
            maximum = absolute_maximum(x, backend)
            x8 = cast_tensorwise(x, maximum, E4M3, columns=trains, backend=backend)
        else:
            x8, mean, rstd, length = cast_norm(
                x, norm_weight, norm_bias,
                eps=eps, centers=centers, columns=trains, backend=backend,
            )  # fmt: skip
            normed = (x, norm_weight, norm_bias, mean, rstd)
        z = multiply(x8.rows, up_rows, x8.scale, up_scale, x.dtype, fast=True, bias=up_bias)
        if reach is None:
            maximum, slope = hidden_maxima(z, gated=gated, backend=backend)
        else:
            maximum, slope = hidden_bound(length, reach, up_bias)
        a8 = cast_hidden(z, maximum, gated=gated, columns=trains and not remakes, backend=backend)
        ctx.save_for_backward(
            *normed, x8.columns, x8.scale, z, maximum, slope, a8.columns, a8.scale,
            up if up_columns is None else up_columns, up_scale,
            down if down_columns is None else down_columns, down_scale,
        )  # fmt: skip
        ctx.casts, ctx.gated, ctx.recipe, ctx.centers = up_columns is None, gated, recipe, centers
        ctx.dtypes = up.dtype, down.dtype
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (up_bias, down_bias)]
        return multiply(
            a8.rows, down_rows, a8.scale, down_scale, x.dtype,
            fast=True, bias=down_bias, stream=None if norm_weight is None else x,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, *of_products = ctx.saved_tensors
        x_columns, x_scale, z, maximum, slope, a_columns, a_scale, *weights = of_products
        up, up_scale, down, down_scale = weights
        backend, fast, gated = ctx.recipe.backend, ctx.recipe.fast_backward, ctx.gated
        of_up, of_down = ctx.dtypes
        of_up_bias, of_down_bias = ctx.bias_dtypes
        if ctx.casts:
            down, down_scale = one_layout(down, backend, rows=False)
        largest = absolute_maximum(dy, backend)
        dy8, d_down_bias = cast_gradient(
            dy, largest, sums=of_down_bias is not None, backend=backend
        )
        da = multiply(dy8.rows, down, dy8.scale, down_scale, z.dtype, fast=fast)
        if a_columns is None:
            again = cast_hidden(z, maximum, gated=gated, rows=False, backend=backend)
            a_columns, a_scale = again.columns, again.scale
        d_down = multiply(dy8.columns, a_columns, dy8.scale, a_scale, of_down, fast=fast)
        bound = gradient_bound(slope, dy8.scale, down_scale, dy.size(1))
        dz8, d_up_bias = cast_hidden_gradient(
            z, da, bound, gated=gated, sums=of_up_bias is not None, backend=backend
        )
        if ctx.casts:
            up, up_scale = one_layout(up, backend, rows=False)
        dx = multiply(dz8.rows, up, dz8.scale, up_scale, z.dtype, fast=fast)
        d_up = multiply(dz8.columns, x_columns, dz8.scale, x_scale, of_up, fast=fast)
        of_norm: tuple[Tensor | None, ...] = (dx, None, None)
        if norm_weight is not None:
            of_norm = norm_gradient(
                dx, dy, x, norm_weight, norm_bias, mean, rstd, ctx.centers, backend
            )
        return (
            *of_norm, None, None, d_up, None if d_up_bias is None else d_up_bias.to(of_up_bias),
            d_down, None if d_down_bias is None else d_down_bias.to(of_down_bias), *[None] * 11,
        )  # fmt: skip
