"""How a dense GPT is split over the tensor ranks: one table, and the function that applies it.

The model files import nothing from here. Scheme: Shoeybi et al. 2019, arXiv:1909.08053, section 3,
with the residual stream split along the sequence (flashtrain/parallel/layers.py).
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from flashtrain.config import Mlp, ModelConfig
from flashtrain.model.attention import Attention
from flashtrain.parallel.layers import (
    ColumnLinear,
    Part,
    RowLinear,
    VocabularyEmbedding,
    mark_replicated,
)
from flashtrain.parallel.mesh import Axis

# a dense module, of the type its pattern finds -> what stands in its place
Splitter = Callable[[Any, Axis], nn.Module]
Plan = Mapping[str, Splitter]  # module-name pattern -> how such a module is split


def gpt_plan(model: ModelConfig) -> Plan:
    """The table for `flashtrain.model.gpt.GPT`; `model` is resolved."""
    assert model.head_size is not None
    assert model.n_kv_heads is not None
    assert model.d_ff is not None
    q = Part(model.n_heads * model.head_size, unit=model.head_size)
    k = v = Part(model.n_kv_heads * model.head_size, unit=model.head_size, shared=True)
    gate = up = Part(model.d_ff)

    plan: dict[str, Splitter] = {
        "embedding": VocabularyEmbedding.from_dense,  # [V, D] -> [V/n, D]
        "position": replicate,
        "blocks.*.norm_attention": replicate,
        "blocks.*.attention": own_heads(model.n_heads),
        "blocks.*.attention.qkv": columns(q, k, v),  # [(H + 2K) D, D] -> [(H/n + 2K/n) D, D]
        "blocks.*.attention.q_norm": replicate,
        "blocks.*.attention.k_norm": replicate,
        "blocks.*.attention.out": RowLinear.from_dense,  # [D, HD] -> [D, HD/n]
        "blocks.*.norm_mlp": replicate,
        "blocks.*.mlp.up": columns(up),  # [F, D] -> [F/n, D]
        "blocks.*.mlp.gate_up": columns(gate, up),  # [2F, D] -> [2F/n, D]
        "blocks.*.mlp.down": RowLinear.from_dense,  # [D, F] -> [D, F/n]
        "norm": replicate,
        "head": columns(),  # [V, D] -> [V/n, D]
    }
    del plan["blocks.*.mlp.up" if model.mlp is Mlp.swiglu else "blocks.*.mlp.gate_up"]
    if not model.qk_norm:
        del plan["blocks.*.attention.q_norm"], plan["blocks.*.attention.k_norm"]
    return plan


def columns(*parts: Part) -> Splitter:
    """Split a linear layer by output features, each part on its own; no parts: as one."""
    return lambda module, axis: ColumnLinear.from_dense(module, axis, parts)


def replicate(module: nn.Module, axis: Axis) -> nn.Module:
    """Keep a module whole on every rank; its gradients are terms of a sum over them."""
    for parameter in module.parameters():
        mark_replicated(parameter, axis)
    return module


def own_heads(n_heads: int) -> Splitter:
    """Tell an attention module which query heads of the model are its own."""

    def split(module: Attention, axis: Axis) -> Attention:
        if n_heads % axis.size:
            raise ValueError(f"{n_heads} heads do not divide over {axis.size} tensor ranks")
        module.first_head = axis.rank * (n_heads // axis.size)
        return module

    return split


def apply_plan(model: nn.Module, plan: Plan, axis: Axis) -> None:
    """Replace every module the plan names by this rank's shard, in place.

    Works on meta tensors, and on real ones, whose slices it copies. A head that shared the
    embedding's weight shares its shard again. An axis of one leaves the model as it is.

    Raises ValueError for a pattern that matches no module, for a size that does not divide, and for
    a parameter that no entry of the plan covers: its gradient would silently lack other ranks'
    terms.
    """
    if axis.size == 1:
        return
    names = [name for name, _ in model.named_modules()]
    owners = _shared_parameters(model)
    for pattern, split in plan.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"plan entry {pattern!r} matches no module of the model")
        for name in matches:
            try:
                model.set_submodule(name, split(model.get_submodule(name), axis))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for first, *others in owners:
        for other in others:
            _set_parameter(model, other, model.get_parameter(first))
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "shard"):
            raise ValueError(f"no plan entry covers the parameter {name!r}: say how it is split")


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, more than one where modules share it."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
