"""The last checks before workers start: files, memory, kernels. One process, no GPU memory touched.

`config.load` has checked keys, types and numbers against each other; this holds the config against
the machine it is to run on.
"""

import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.config import Config, ConfigError, PositionKind
from flashtrain.data.source import prepare_source
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import n_parameters
from flashtrain.tracking.wandb import choose_mode
from kernels.attention import explain

BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments


def admit(config: Config, world_size: int, local_processes: int) -> Config:
    """The config completed by what its data says, if it can run here.

    Makes the embedded text's token shards where they are absent. Raises ConfigError or DataError.
    """
    choose_mode(config.tracking.wandb.mode)  # refuses a W&B that is asked for and not installed
    _check_files(config)
    config = prepare_source(config, world_size)
    _check_memory(config, local_processes)
    describe_attention(config)
    return config


def describe_attention(config: Config) -> str:
    """Which backend `attention.backend` means for this run, and why. ConfigError if none can."""
    model, tensor = config.model, config.parallel.tensor or 1
    assert model.n_kv_heads is not None and model.head_size is not None
    batch, T = config.data.micro_batch_size or 1, config.data.sequence_length
    heads = (model.n_heads // tensor, max(1, model.n_kv_heads // tensor))
    rows = (heads[0] + 2 * heads[1]) * model.head_size
    with FakeTensorMode():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fused = torch.empty(batch, T, rows, device=device, dtype=DTYPES[config.precision.compute])
        parts = (heads[0], heads[1], heads[1])
        q, k, v = fused.unflatten(-1, (-1, model.head_size)).split(parts, dim=2)
        slopes = None
        if config.position.kind is PositionKind.alibi:
            slopes = torch.empty(heads[0], device=device)
        name = config.attention.backend.name
        try:
            return explain(q, k, v, causal=True, alibi_slopes=slopes, backend=name)
        except ValueError as error:
            raise ConfigError(f"attention.backend={name}: {error}") from error


def _check_files(config: Config) -> None:
    vectors, resume = config.model.word_vectors, config.checkpoint.resume
    if vectors is not None and not Path(vectors).is_file():
        raise ConfigError(f"model.word_vectors={vectors} is not a file")
    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise ConfigError(
            f"checkpoint.resume={resume} is not a checkpoint (it has no manifest.json): name a "
            "folder like runs/NAME/checkpoints/step-00000100, or auto, or never"
        )


def _check_memory(config: Config, local_processes: int) -> None:
    """Refuse a model whose weights and optimizer alone are larger than the memory they go to."""
    parameters = n_parameters(config.model, config.position, config.data.sequence_length)
    needed = parameters * BYTES_PER_PARAMETER // (config.parallel.tensor or 1)
    if torch.cuda.is_available():
        where, there = "GPU", torch.cuda.get_device_properties(0).total_memory
    else:
        where = f"machine's share for one of {local_processes} processes"
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_processes
    if needed > there:
        raise ConfigError(
            f"{parameters:,} parameters need {needed / 2**30:,.1f} GiB per process for weights, "
            f"gradients and AdamW's moments, and this {where} has {there / 2**30:,.1f}: choose a "
            "smaller model or a higher parallel.tensor"
        )
