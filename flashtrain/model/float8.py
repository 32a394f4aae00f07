"""Which layers multiply in fp8 (float8_product.py, float8_mlp.py); casting their weights."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.config import LinearKind, PrecisionConfig
from flashtrain.model.float8_product import Float8Product, Recipe
from flashtrain.model.gpt import GPT
from flashtrain.model.linear import is_float8
from flashtrain.model.mlp import GeluMLP
from flashtrain.precision import MULTIPLE


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
        mlp = block.get_submodule("mlp")
        if isinstance(mlp, GeluMLP) and is_float8(mlp.up):
            product = mlp.up.product
            assert isinstance(product, Float8Product)
            product.measures = keeps_weight
    if keeps_weight:
        # before the model's forward, not in a layer's, where torch.compile would have to trace it
        model.register_forward_pre_hook(partial(_refresh, layers))


def _refresh(layers: list[nn.Module], _model: nn.Module, _inputs: object) -> None:
    refresh_weights(layers)
