"""From a config to a filled, sharded model, without ever holding the whole of it on one rank."""

import torch
from torch import nn

from flashtrain.config import Config
from flashtrain.data.tokenizer import Tokenizer
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.model.word_vectors import load_word_vectors, start_from_word_vectors
from flashtrain.parallel.mesh import Axis
from flashtrain.parallel.plan import apply_plan, gpt_plan


def build_model(config: Config, tensor: Axis, device: torch.device) -> GPT:
    """This rank's shard of the model on `device`, weights a function of `config.seed` alone."""
    with torch.device("meta"):
        model = GPT(
            config.model,
            config.position,
            max_length=config.data.sequence_length,
            backend=config.attention.backend.name,
            dtype=DTYPES[config.precision.compute],
        )
    apply_plan(model, gpt_plan(config.model, config.position), tensor)
    materialize(model, device)
    init_weights(model, config.seed)
    return model


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
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                fresh = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                fresh.__dict__.update(parameter.__dict__)
                made[parameter] = fresh
            setattr(module, name, made[parameter])


def start_from_vectors(model: GPT, config: Config, tokenizer: Tokenizer) -> str:
    """Fill token embeddings from `model.word_vectors`; returns a line that says what matched."""
    assert config.model.word_vectors is not None
    found = load_word_vectors(
        config.model.word_vectors, tokenizer.token_strings(), config.model.d_model
    )
    start_from_word_vectors(model, found, config.model.init_std)
    return (
        f"word vectors: {found.matched_share:.1%} of {tokenizer.size} tokens start from "
        f"{config.model.word_vectors}"
    )
