"""An MLP whose two products are in fp8 tensorwise, as one: what is between them is cast to fp8 as
it is computed (kernels/fp8_cast/mlp.py), where two layers of float8_product.py would write it in
bf16, read it for its maximum and read it for the cast.

Dims: M tokens, K features of the stream, F hidden features; z is [M, F], gated [M, 2 F].

    z = X U^T + u    a = gelu(z), or silu(g) v of z = [g | v]    Y = a D^T
    dD = dY^T a      da = dY D    dz = da a'(z)                  dX = dz U      dU = dz^T X

Kept for backward: X and a in fp8, transposed, and z in 16 bits, as of two layers. Where the first
layer `remakes` (trainer.recompute=light) a is cast from z once more, and not kept. All scales are
of largest numbers but that of dz, which is of a bound.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.model.float8_product import Float8Product, Recipe, multiply, one_layout
from kernels.fp8_cast import (
    E4M3,
    E5M2,
    absolute_maximum,
    cast_hidden,
    cast_hidden_gradient,
    cast_tensorwise,
    gradient_bound,
    hidden_maxima,
)


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
    first, second = up.product, down.product
    assert isinstance(first, Float8Product) and isinstance(second, Float8Product)
    x = up.arrive(x)
    flat = x.reshape(-1, x.shape[-1])
    trains = first.trains(flat, up.weight)
    y: Tensor = _MLP.apply(
        flat, up.weight, up.bias, down.weight, *first.cast(up.weight), first.columns,
        *second.cast(down.weight), second.columns, gated, trains, first.recipe,
        getattr(up, "remakes", False),
    )  # type: ignore[no-untyped-call]  # fmt: skip
    y = down.leave(y.view(x.shape))
    # in fp32, so that the bias' gradient is never rounded; a compiler fuses it with what comes next
    return y if down.bias is None else (y + down.bias).to(y.dtype)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, bias: Tensor | None, down: Tensor,
        up_rows: Tensor, up_scale: Tensor, up_columns: Tensor | None,
        down_rows: Tensor, down_scale: Tensor, down_columns: Tensor | None,
        gated: bool, trains: bool, recipe: Recipe, remakes: bool,
    ) -> Tensor:  # fmt: skip
        backend = recipe.backend
        x8 = cast_tensorwise(x, absolute_maximum(x, backend), E4M3, columns=trains, backend=backend)
        z = multiply(x8.rows, up_rows, x8.scale, up_scale, x.dtype, fast=True, bias=bias)
        maximum, slope = hidden_maxima(z, gated=gated, backend=backend)
        a8 = cast_hidden(z, maximum, gated=gated, columns=trains and not remakes, backend=backend)
        ctx.save_for_backward(
            x8.columns, x8.scale, z, maximum, slope, a8.columns, a8.scale,
            up if up_columns is None else up_columns, up_scale,
            down if down_columns is None else down_columns, down_scale,
        )  # fmt: skip
        ctx.casts, ctx.gated, ctx.recipe = up_columns is None, gated, recipe
        ctx.dtypes = up.dtype, down.dtype, None if bias is None else bias.dtype
        return multiply(a8.rows, down_rows, a8.scale, down_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_scale, z, maximum, slope, a_columns, a_scale, *weights = ctx.saved_tensors
        up, up_scale, down, down_scale = weights
        backend, fast, gated = ctx.recipe.backend, ctx.recipe.fast_backward, ctx.gated
        of_up, of_down, of_bias = ctx.dtypes
        if ctx.casts:
            down, down_scale = one_layout(down, backend, rows=False)
        dy8 = cast_tensorwise(dy, absolute_maximum(dy, backend), E5M2, backend=backend)
        da = multiply(dy8.rows, down, dy8.scale, down_scale, z.dtype, fast=fast)
        if a_columns is None:
            again = cast_hidden(z, maximum, gated=gated, rows=False, backend=backend)
            a_columns, a_scale = again.columns, again.scale
        d_down = multiply(dy8.columns, a_columns, dy8.scale, a_scale, of_down, fast=fast)
        bound = gradient_bound(slope, dy8.scale, down_scale, dy.size(1))
        dz8, sums = cast_hidden_gradient(
            z, da, bound, gated=gated, sums=of_bias is not None, backend=backend
        )
        if ctx.casts:
            up, up_scale = one_layout(up, backend, rows=False)
        dx = multiply(dz8.rows, up, dz8.scale, up_scale, z.dtype, fast=fast)
        d_up = multiply(dz8.columns, x_columns, dz8.scale, x_scale, of_up, fast=fast)
        return dx, d_up, None if sums is None else sums.to(of_bias), d_down, *[None] * 10
