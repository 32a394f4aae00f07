"""One linear layer's products in fp8, from 16-bit activations and fp32 master weights.

Dims: M tokens, K input features, N output features. A layer is three products:

    Y [M, N] = X W^T        dX [M, K] = dY W        dW [N, K] = dY^T X

The hardware takes both operands with the summed dimension contiguous, so X, W and dY are needed as
they lie and transposed; one pass casts both ways (kernels/fp8_cast). Scales are those of the tensor
at hand, never of an earlier step ("current scaling"); X and W are e4m3.

    tensorwise  one scale a tensor; dY e5m2, all three products in fp8, dW in fp32. Of X only the
                transposed fp8 numbers are kept for the backward: half of bf16. Where X is a norm's
                output it is cast as it is computed, by the scale of a bound.
    rowwise     a scale for each row of an operand (token, or output feature); dY e4m3; dW in bf16
                from X and dY as they are, because there the summed dimension is that of the scales

Fast accumulation, which keeps fewer bits of partial sums, only forward, unless the config says
otherwise (`precision.fast_backward`): errors of gradients add up over the depth. Both choices are
those of torchao's float8 recipes of the same names (rowwise: its "rowwise_with_gw_hp").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.model.norm import StreamNorm
from flashtrain.precision import MULTIPLE
from kernels.fp8_cast import (
    E4M3,
    absolute_maximum,
    cast_columnwise,
    cast_gradient,
    cast_norm,
    cast_rowwise,
    cast_tensorwise,
    longest_row,
)
from kernels.linear import add_float8_product
from kernels.norm import norm_gradient


@dataclass(frozen=True)
class Recipe:
    """How a layer's products are cast and summed."""

    rowwise: bool = False
    fast_backward: bool = False  # fast accumulation in the backward's products too
    backend: str = "auto"  # of the casts


class Float8Product(nn.Module):
    """x [.., K], weight [N, K], bias [N] -> x weight^T + bias [.., N] in x's dtype.

    Stands where a layer's `product` was (flashtrain/model/linear.py) and has no parameters.

    recipe: rowwise takes bf16 x only.
    keeps_weight: the weight is cast by `refresh`, before forward, whenever it has changed. False:
        in every forward and once more in every backward, so that nothing outlives a weight that is
        only gathered for its use (FSDP).
    """

    def __init__(self, name: str, recipe: Recipe, keeps_weight: bool = True) -> None:
        super().__init__()
        self.name, self.recipe, self.keeps_weight = name, recipe, keeps_weight
        self.version = -1  # of the weight that was cast
        self.measures = False  # whether casting finds `reach`, too (kernels/fp8_cast/mlp.py)
        # no buffers: they are neither saved nor sent to other ranks
        self.rows: Tensor | None = None  # [N, K] fp8
        self.scale: Tensor | None = None  # of rows: 0-dim, or [N, 1]
        self.columns: Tensor | None = None  # [K, N] fp8
        self.column_scale: Tensor | None = None  # [K, 1]; None where `scale` is of both
        self.reach: Tensor | None = None  # length of the weight's longest row

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None = None
    ) -> Tensor:
        """stream [.., N], in x's dtype, is added."""
        flat = x.reshape(-1, x.shape[-1])
        trains = self.trains(flat, weight)
        rows, scale = self.cast(weight)
        if self.recipe.rowwise:
            y: Tensor = _Rowwise.apply(  # type: ignore[no-untyped-call]
                flat, weight, rows, scale, self.columns, self.column_scale, self.recipe
            )
            y = y.view(*x.shape[:-1], weight.size(0))
            # products with a scale a row have not been seen to add a bias on a GPU
            y = y if bias is None else (y + bias).to(y.dtype)
            return y if stream is None else stream + y
        y = _Tensorwise.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, None if stream is None else stream.reshape(-1, weight.size(0)),
            rows, scale, self.columns, trains, self.recipe,
        )  # fmt: skip
        return y.view(*x.shape[:-1], weight.size(0))

    def behind_norm(
        self, norm: StreamNorm, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """norm(x) weight^T + bias, and x, the stream, whose gradient is added by the kernel that
        differentiates the norm. Tensorwise only."""
        flat = x.reshape(-1, x.shape[-1])
        trains = self.trains(flat, weight)
        y, rows = _NormTensorwise.apply(  # type: ignore[no-untyped-call]
            flat, norm.weight, norm.bias, norm.eps, norm.centers, weight, bias,
            *self.cast(weight), self.columns, trains, self.recipe,
        )  # fmt: skip
        return y.view(*x.shape[:-1], weight.size(0)), rows.view(x.shape)

    def trains(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether backward will come. ValueError for so many rows [M, K] as it cannot take."""
        trains = torch.is_grad_enabled() and weight.requires_grad
        if trains and rows.size(0) % MULTIPLE:
            raise ValueError(
                f"{self.name}: fp8 products need a number of tokens that {MULTIPLE} divides, not "
                f"{rows.size(0)}: change data.micro_batch_size or data.sequence_length, or take "
                "precision=bf16"
            )
        return trains

    def cast(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight in fp8 as it lies, and its scale."""
        if not self.keeps_weight:
            return cast_weight(weight.detach(), self.recipe)
        if self.rows is None or self.scale is None:
            raise RuntimeError(f"{self.name}: call refresh_weights before the first forward")
        return self.rows, self.scale

    def refresh(self, weight: Tensor, maximum: Tensor | None = None) -> None:
        """Cast the weight both ways; `maximum` is that of |weight|, where it is known."""
        if self.recipe.rowwise:
            self.rows, self.scale = cast_weight(weight, self.recipe)
            self.columns, self.column_scale = turn_weight(weight, self.recipe)
        else:
            if maximum is None:
                maximum = absolute_maximum(weight, self.recipe.backend)
            made = cast_tensorwise(weight, maximum, E4M3, backend=self.recipe.backend)
            self.rows, self.columns, self.scale = made
        self.reach = longest_row(weight) if self.measures else None
        self.version = weight._version

    def extra_repr(self) -> str:
        return "rowwise" if self.recipe.rowwise else "tensorwise"


def cast_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[N, K] -> fp8 [N, K] and its scale, 0-dim or [N, 1]."""
    if recipe.rowwise:
        return cast_rowwise(weight, E4M3, recipe.backend)
    return one_layout(weight, recipe.backend, rows=True)


def turn_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[N, K] -> fp8 [K, N] and its scale, 0-dim or [K, 1]."""
    if recipe.rowwise:
        return cast_columnwise(weight, E4M3, recipe.backend)
    return one_layout(weight, recipe.backend, rows=False)


def one_layout(weight: Tensor, backend: str, rows: bool) -> tuple[Tensor, Tensor]:
    maximum = absolute_maximum(weight, backend)
    made = cast_tensorwise(weight, maximum, E4M3, rows=rows, columns=not rows, backend=backend)
    q = made.rows if rows else made.columns
    assert q is not None
    return q, made.scale


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None,
        rows: Tensor, scale: Tensor, columns: Tensor | None, trains: bool, recipe: Recipe,
    ) -> Tensor:  # fmt: skip
        maximum = absolute_maximum(x, recipe.backend)
        x8 = cast_tensorwise(x, maximum, E4M3, columns=trains, backend=recipe.backend)
        ctx.save_for_backward(x8.columns, x8.scale, weight if columns is None else columns, scale)
        ctx.casts, ctx.recipe, ctx.adds = columns is None, recipe, stream is not None
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return multiply(
            x8.rows, rows, x8.scale, scale, x.dtype, fast=True, bias=bias, stream=stream
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _gradients(grad, ctx.saved_tensors, ctx.casts, ctx.recipe, ctx.dtypes)
        return *gradients, grad if ctx.adds else None, *[None] * 5


class _NormTensorwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float,
        centers: bool, weight: Tensor, bias: Tensor | None, rows: Tensor, scale: Tensor,
        columns: Tensor | None, trains: bool, recipe: Recipe,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x8, mean, rstd, _ = cast_norm(
            x, norm_weight, norm_bias,
            eps=eps, centers=centers, columns=trains, backend=recipe.backend,
        )  # fmt: skip
        ctx.save_for_backward(
            x, norm_weight, norm_bias, mean, rstd,
            x8.columns, x8.scale, weight if columns is None else columns, scale,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.casts, ctx.recipe, ctx.centers = columns is None, recipe, centers
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return multiply(x8.rows, rows, x8.scale, scale, x.dtype, fast=True, bias=bias), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, *multiplied = ctx.saved_tensors
        if grad is None:  # only the stream went on
            return ds, *[None] * 11
        dy, dw, db = _gradients(grad, multiplied, ctx.casts, ctx.recipe, ctx.dtypes)
        of_norm = norm_gradient(
            dy, ds, x, norm_weight, norm_bias, mean, rstd, ctx.centers, ctx.recipe.backend
        )
        return *of_norm, None, None, dw, db, *[None] * 5


def _gradients(
    grad: Tensor, multiplied: Sequence[Tensor], casts: bool, recipe: Recipe, dtypes: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dX, dW, db, in `dtypes`. multiplied: X in fp8 transposed and its scale, and so the weight,
    which with `casts` is as it is and cast now."""
    x_columns, x_scale, columns, scale = multiplied
    of_x, of_weight, of_bias = dtypes
    if casts:
        columns, scale = one_layout(columns, recipe.backend, rows=False)
    maximum = absolute_maximum(grad, recipe.backend)
    grad8, sums = cast_gradient(grad, maximum, sums=of_bias is not None, backend=recipe.backend)
    fast = recipe.fast_backward
    dx = multiply(grad8.rows, columns, grad8.scale, scale, of_x, fast=fast)
    dw = multiply(grad8.columns, x_columns, grad8.scale, x_scale, of_weight, fast=fast)
    return dx, dw, None if sums is None else sums.to(of_bias)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor,
        columns: Tensor | None, column_scale: Tensor | None, recipe: Recipe,
    ) -> Tensor:  # fmt: skip
        q, x_scale = cast_rowwise(x, E4M3, recipe.backend)
        ctx.save_for_backward(x, weight if columns is None else columns, column_scale)
        ctx.casts, ctx.recipe, ctx.dtype = columns is None, recipe, weight.dtype
        return multiply(q, rows, x_scale, scale.t(), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, columns, scale = ctx.saved_tensors
        backend, fast = ctx.recipe.backend, ctx.recipe.fast_backward
        if ctx.casts:
            columns, scale = cast_columnwise(columns, E4M3, backend)
        q, grad_scale = cast_rowwise(grad, E4M3, backend)
        dx = multiply(q, columns, grad_scale, scale.t(), x.dtype, fast=fast)
        return dx, (grad.t() @ x).to(ctx.dtype), *[None] * 5


def multiply(
    a: Tensor | None, b: Tensor | None, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype,
    *, fast: bool, bias: Tensor | None = None, stream: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a [m, k], b [n, k] in fp8, each times its scale -> a b^T + bias + stream [m, n] in dtype.

    bias: [n]; stream: [m, n] in dtype.
    """
    assert a is not None and b is not None
    if stream is not None:
        return add_float8_product(a, b, a_scale, b_scale, bias, stream, fast)
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )
