"""From a config to a filled, sharded model, without ever holding the whole of it on one rank."""

from collections.abc import Callable

import torch
from torch import nn

from flashtrain.checkpoint.tensors import LocalTensor
from flashtrain.config import Config, EngineKind
from flashtrain.data.tokenizer import Tokenizer
from flashtrain.engine.base import Engine
from flashtrain.engine.native import NativeEngine
from flashtrain.layout import overlap_of
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.float8 import use_float8
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.model.word_vectors import load_word_vectors, start_from_word_vectors
from flashtrain.parallel.context import split_context
from flashtrain.parallel.fsdp import empty_part, shard_model
from flashtrain.parallel.mesh import Axis, Mesh
from flashtrain.parallel.overlap import overlap_layers
from flashtrain.parallel.pipeline import cut_stages
from flashtrain.parallel.plan import apply_plan, gpt_plan
from flashtrain.precision import is_fp8


def build_model(
    config: Config, tensor: Axis, device: torch.device, cut: Callable[[GPT], object] | None = None
) -> GPT:
    """This rank's shard of the model on `device`, weights a function of `config.seed` alone.

    cut: what else shards it, after the tensor-parallel plan and before it has memory.
    """
    model = plan_model(config, tensor)
    if cut is not None:
        cut(model)
    materialize(model, device)
    init_weights(model, config.seed)
    return model


def plan_model(config: Config, tensor: Axis) -> GPT:
    """This rank's tensor-parallel shard of the model on the meta device, without memory."""
    with torch.device("meta"):
        model = GPT(
            config.model,
            config.position,
            max_length=config.data.sequence_length,
            backend=config.attention.backend.name,
            dtype=DTYPES[config.precision.compute],
        )
    apply_plan(model, gpt_plan(config.model), tensor)
    return model


def build_engine(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    """The engine that `engine.name` names, over its part of a fresh model. Collective."""
    compute = DTYPES[config.precision.compute]
    if config.engine.name is EngineKind.deepspeed:
        from flashtrain.engine.deepspeed import DeepSpeedEngine  # an extra: not installed by all

        model = plan_model(config, mesh.tensor).to(compute)
        overlap_layers(model, mesh.tensor, overlap_of(config), device)
        materialize(model, device)
        return DeepSpeedEngine(model, config, mesh, device)

    if mesh.pipeline.size > 1:
        return build_pipeline(config, mesh, device)

    def cut(model: GPT) -> None:
        overlap_layers(model, mesh.tensor, overlap_of(config), device)
        split_context(model, mesh.context, config.parallel.context_kind)
        shard_model(model, mesh, config.parallel.zero, compute, device)
        if is_fp8(config):
            use_float8(model, config.precision, keeps_weight=mesh.shard.size == 1)

    return NativeEngine(build_model(config, mesh.tensor, device, cut), config, mesh, device)


def build_pipeline(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    """The engine over this rank's stages of a fresh model. Collective."""
    from flashtrain.engine.pipeline import PipelineEngine  # its imports take a second

    model = plan_model(config, mesh.tensor)
    overlap_layers(model, mesh.tensor, overlap_of(config), device)
    split_context(model, mesh.context, config.parallel.context_kind)
    names = frozenset(name for name, _ in model.named_parameters())
    stages = cut_stages(model, mesh.pipeline, config.parallel)
    compute = DTYPES[config.precision.compute]
    for stage in stages:
        shard_model(stage.model, mesh, config.parallel.zero, compute, device)
        if is_fp8(config):
            use_float8(stage.model, config.precision, keeps_weight=mesh.shard.size == 1)
    materialize(nn.ModuleList(stages), device)
    for stage in stages:
        init_weights(stage.model, config.seed)
    return PipelineEngine(stages, names, config, mesh, device)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory on `device`, keeping ties and the notes a plan left on them.

    `Module.to_empty` makes a new parameter for every name, which would untie the head and drop
    `parameter.shard`.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                # not empty_like: on meta it imports the symbolic-shape code, 1.5 s
                memory = empty_part(parameter, device)
                fresh = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                fresh.__dict__.update(parameter.__dict__)
                made[parameter] = fresh
            setattr(module, name, made[parameter])


def start_from_vectors(table: LocalTensor, config: Config, tokenizer: Tokenizer) -> str:
    """Fill token embeddings from `model.word_vectors`; returns a line that says what matched."""
    assert config.model.word_vectors is not None
    found = load_word_vectors(
        config.model.word_vectors, tokenizer.token_strings(), config.model.d_model
    )
    start_from_word_vectors(table.tensor, table.boxes, found, config.model.init_std)
    return (
        f"word vectors: {found.matched_share:.1%} of {tokenizer.size} tokens start from "
        f"{config.model.word_vectors}"
    )
