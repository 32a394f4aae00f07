"""Linear layers whose products run in fp8, from 16-bit activations and fp32 master weights.

Dims: M tokens, K input features, N output features. A layer is three products:

    Y [M, N] = X W^T        dX [M, K] = dY W        dW [N, K] = dY^T X

The hardware takes both operands with the summed dimension contiguous, so X, W and dY are needed as
they lie and transposed; one pass casts both ways (kernels/fp8_cast). Scales are those of the tensor
at hand, never of an earlier step ("current scaling"); X and W are e4m3.

    tensorwise  one scale a tensor; dY e5m2, all three products in fp8, dW in fp32. Of X only the
                transposed fp8 numbers are kept for the backward: half of bf16.
    rowwise     a scale for each row of an operand (token, or output feature); dY e4m3; dW in bf16
                from X and dY as they are, because there the summed dimension is that of the scales

Fast accumulation, which keeps fewer bits of partial sums, only forward, unless the config says
otherwise (`precision.fast_backward`): errors of gradients add up over the depth. Both choices are
those of torchao's float8 recipes of the same names (rowwise: its "rowwise_with_gw_hp").
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.config import LinearKind, PrecisionConfig
from flashtrain.model.gpt import GPT
from flashtrain.precision import MULTIPLE
from kernels.fp8_cast import (
    E4M3,
    E5M2,
    absolute_maximum,
    cast_columnwise,
    cast_rowwise,
    cast_tensorwise,
)


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
        # no buffers: they are neither saved nor sent to other ranks
        self.rows: Tensor | None = None  # [N, K] fp8
        self.scale: Tensor | None = None  # of rows: 0-dim, or [N, 1]
        self.columns: Tensor | None = None  # [K, N] fp8
        self.column_scale: Tensor | None = None  # [K, 1]; None where `scale` is of both

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        trains = torch.is_grad_enabled() and weight.requires_grad
        if trains and flat.size(0) % MULTIPLE:
            raise ValueError(
                f"{self.name}: fp8 products need a number of tokens that {MULTIPLE} divides, not "
                f"{flat.size(0)}: change data.micro_batch_size or data.sequence_length, or take "
                "precision=bf16"
            )
        rows, scale = self.rows, self.scale
        if not self.keeps_weight:
            rows, scale = cast_weight(weight.detach(), self.recipe)
        elif rows is None:
            raise RuntimeError(f"{self.name}: call refresh_weights before the first forward")
        product = _Rowwise if self.recipe.rowwise else _Tensorwise
        y: Tensor = product.apply(  # type: ignore[no-untyped-call]
            flat, weight, rows, scale, self.columns, self.column_scale,
            trains, self.recipe.fast_backward, self.recipe.backend,
        )  # fmt: skip
        y = y.view(*x.shape[:-1], weight.size(0))
        return y if bias is None else y + bias.to(y.dtype)

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
        self.version = weight._version

    def extra_repr(self) -> str:
        return "rowwise" if self.recipe.rowwise else "tensorwise"


def cast_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[N, K] -> fp8 [N, K] and its scale, 0-dim or [N, 1]."""
    if recipe.rowwise:
        return cast_rowwise(weight, E4M3, recipe.backend)
    return _one_layout(weight, recipe.backend, rows=True)


def turn_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[N, K] -> fp8 [K, N] and its scale, 0-dim or [K, 1]."""
    if recipe.rowwise:
        return cast_columnwise(weight, E4M3, recipe.backend)
    return _one_layout(weight, recipe.backend, rows=False)


def _one_layout(weight: Tensor, backend: str, rows: bool) -> tuple[Tensor, Tensor]:
    maximum = absolute_maximum(weight, backend)
    made = cast_tensorwise(weight, maximum, E4M3, rows=rows, columns=not rows, backend=backend)
    q = made.rows if rows else made.columns
    assert q is not None
    return q, made.scale


def refresh_weights(layers: Iterable[Any]) -> None:
    """Cast the weights that changed since they were cast: once per optimizer step.

    layers: modules with a `weight` and, as `product`, a Float8Product that keeps it.
    """
    changed = [layer for layer in layers if layer.product.version != layer.weight._version]
    if not changed:
        return
    # what is first cast while sampling under inference_mode must still serve training
    with torch.inference_mode(False), torch.no_grad():
        maxima: list[Tensor | None] = [None] * len(changed)
        if not changed[0].product.recipe.rowwise:  # a few kernels for all of them
            weights = [layer.weight for layer in changed]
            maxima = list(torch._foreach_norm(weights, ord=float("inf")))
        for layer, maximum in zip(changed, maxima, strict=True):
            layer.product.refresh(layer.weight, maximum)


def use_float8(
    model: GPT, precision: PrecisionConfig, keeps_weight: bool = True, backend: str = "auto"
) -> None:
    """Let the blocks' linear layers multiply in fp8, in place. Embedding and head stay as they are.

    precision: `linear` is an fp8 kind; `keep_blocks` at either end stay as they are, too;
        `fast_backward` as in Recipe.
    keeps_weight: see Float8Product; True needs weights that are whole in memory.
    backend: of the casts.

    Raises ValueError for a layer that 16 does not divide, or with no block left to change.
    """
    keep, count = precision.keep_blocks, model.config.n_layers
    if 2 * keep >= count:
        raise ValueError(f"{keep} blocks kept at either end leave none of {count} to fp8")
    chosen = [str(number) for number in range(keep, count - keep)]
    rowwise = precision.linear is LinearKind.fp8_rowwise
    recipe = Recipe(rowwise, precision.fast_backward, backend)
    layers = []
    for number, block in model.blocks.named_children():  # maybe a part of the model's
        for name, layer in block.named_modules() if number in chosen else ():
            if not hasattr(layer, "product"):
                continue
            path = f"blocks.{number}.{name}"
            N, K = int(layer.out_features), int(layer.in_features)
            for size, what in ((K, "input"), (N, "output")):
                if size % MULTIPLE:
                    raise ValueError(
                        f"{path} has {size} {what} features on this rank, which {MULTIPLE} does "
                        "not divide: fp8 products need that"
                    )
            layer.product = Float8Product(path, recipe, keeps_weight)
            layers.append(layer)
    if keeps_weight:
        # before the model's forward, not in a layer's, where torch.compile would have to trace it
        model.register_forward_pre_hook(partial(_refresh, layers))


def _refresh(layers: list[nn.Module], _model: nn.Module, _inputs: object) -> None:
    refresh_weights(layers)


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor,
        columns: Tensor | None, _column_scale: None,
        trains: bool, fast_backward: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        maximum = absolute_maximum(x, backend)
        x8 = cast_tensorwise(x, maximum, E4M3, columns=trains, backend=backend)
        ctx.save_for_backward(x8.columns, x8.scale, weight if columns is None else columns, scale)
        ctx.casts, ctx.fast, ctx.backend = columns is None, fast_backward, backend
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8.rows, rows, x8.scale, scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_scale, columns, scale = ctx.saved_tensors
        if ctx.casts:
            columns, scale = _one_layout(columns, ctx.backend, rows=False)
        maximum = absolute_maximum(grad, ctx.backend)
        grad8 = cast_tensorwise(grad, maximum, E5M2, backend=ctx.backend)
        of_x, of_weight = ctx.dtypes
        dx = _product(grad8.rows, columns, grad8.scale, scale, of_x, fast=ctx.fast)
        dw = _product(grad8.columns, x_columns, grad8.scale, x_scale, of_weight, fast=ctx.fast)
        return dx, dw, *[None] * 7


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor,
        columns: Tensor | None, column_scale: Tensor | None,
        trains: bool, fast_backward: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        q, x_scale = cast_rowwise(x, E4M3, backend)
        ctx.save_for_backward(x, weight if columns is None else columns, column_scale)
        ctx.casts, ctx.fast, ctx.backend = columns is None, fast_backward, backend
        ctx.dtype = weight.dtype
        return _product(q, rows, x_scale, scale.t(), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, columns, scale = ctx.saved_tensors
        if ctx.casts:
            columns, scale = cast_columnwise(columns, E4M3, ctx.backend)
        q, grad_scale = cast_rowwise(grad, E4M3, ctx.backend)
        dx = _product(q, columns, grad_scale, scale.t(), x.dtype, fast=ctx.fast)
        return dx, (grad.t() @ x).to(ctx.dtype), *[None] * 7


def _product(
    a: Tensor | None, b: Tensor | None, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype,
    *, fast: bool,
) -> Tensor:  # fmt: skip
    """a [m, k], b [n, k] in fp8 -> a b^T [m, n], each times its scale."""
    assert a is not None and b is not None
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )
