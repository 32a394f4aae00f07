"""The last checks before workers start: files, memory, kernels. One process, no GPU memory touched.

`config.load` has checked keys, types and numbers against each other; this holds the config against
the machine it is to run on.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.benchmark import check_benchmark
from flashtrain.checkpoint import CheckpointError, refuse_other_model
from flashtrain.config import (
    Config,
    ConfigError,
    ContextKind,
    EngineKind,
    Moments,
    OptimizerKind,
    Packing,
    PositionKind,
    to_dict,
)
from flashtrain.data.source import open_tokenizer, prepare_source
from flashtrain.job import goes_on
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import GPT, n_parameters
from flashtrain.precision import is_fp8
from flashtrain.secrets_check import refuse_secrets
from flashtrain.tracking.tensorboard import check_tensorboard
from flashtrain.tracking.wandb import choose_mode
from kernels.attention import explain

FP8_SINCE = (8, 9)  # compute capability: Ada, Hopper


def admit(config: Config, world_size: int, local_processes: int) -> Config:
    """The config completed by what its data says, if it can run here.

    Makes the embedded text's token shards where they are absent. Raises ConfigError or DataError.
    """
    refuse_secrets(to_dict(config), os.environ)
    _check_gpus(local_processes)
    choose_mode(config.tracking.wandb.mode)  # refuses a W&B that is asked for and not installed
    check_tensorboard(config.tracking.tensorboard)
    if config.engine.name is EngineKind.deepspeed:
        _check_deepspeed(config)
    _check_files(config)
    _check_fp8(config)
    config = prepare_source(config, world_size)
    _check_model(config)
    _check_benchmark(config)
    _check_memory(config, local_processes)
    _check_copy(config, local_processes)
    describe_attention(config)
    return config


def describe_attention(config: Config) -> str:
    """Which backend `attention.backend` means for this run, and why. ConfigError if none can."""
    model, tensor = config.model, config.parallel.tensor or 1
    context, kind = config.parallel.context, config.parallel.context_kind
    assert model.n_kv_heads is not None and model.head_size is not None
    batch, T = config.data.micro_batch_size or 1, config.data.sequence_length
    heads = (model.n_heads // tensor, max(1, model.n_kv_heads // tensor))
    if context > 1 and kind is ContextKind.ulysses:
        heads = (heads[0] // context, heads[1] // context)
    rows = (heads[0] + 2 * heads[1]) * model.head_size
    with FakeTensorMode():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fused = torch.empty(batch, T, rows, device=device, dtype=DTYPES[config.precision.compute])
        parts = (heads[0], heads[1], heads[1])
        q, k, v = fused.unflatten(-1, (-1, model.head_size)).split(parts, dim=2)
        slopes = None
        if config.position.kind is PositionKind.alibi:
            slopes = torch.empty(heads[0], device=device)
        documents = None
        if config.data.packing is not Packing.none:
            documents = torch.empty(batch, T, device=device, dtype=torch.int64)
        name = config.attention.backend.name
        options: dict[str, Any] = {"alibi_slopes": slopes, "documents": documents}
        if context > 1 and kind is not ContextKind.ulysses:
            q = q[:, : T // (2 * context)]  # a chunk of queries
            if documents is not None:  # and where documents began before it
                key_mask = torch.empty(batch, T, device=device, dtype=torch.bool)
                options = {"alibi_slopes": slopes, "key_mask": key_mask}
            options["return_lse"] = True
        try:
            return explain(q, k, v, causal=True, backend=name, **options)
        except ValueError as error:
            raise ConfigError(f"attention.backend={name}: {error}") from error


def _check_gpus(local_processes: int) -> None:
    """Refuse processes that would find no GPU of their own. Without GPUs all run on the CPU."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_processes:
        raise ConfigError(
            f"{local_processes} processes on this machine, which has {gpus} GPUs"
            f"{_hidden_gpus()}: each takes one, so start {gpus} at most (--nproc, GPUS or "
            "--nproc-per-node)"
        )


def _hidden_gpus() -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if shown is None else f" in CUDA_VISIBLE_DEVICES={shown}"


def _check_files(config: Config) -> None:
    vectors, resume = config.model.word_vectors, config.checkpoint.resume
    if vectors is not None and not Path(vectors).is_file():
        raise ConfigError(f"model.word_vectors={vectors} is not a file")
    weights = config.model.weights
    if weights is not None and vectors is not None:
        raise ConfigError(
            f"model.weights={weights} and model.word_vectors={vectors}: token embeddings start "
            "from one or the other"
        )
    if weights is not None and not Path(weights).is_dir():
        raise ConfigError(
            f"model.weights={weights} is not a folder: name a run folder (scripts/import_hf.py "
            "makes one of a Hugging Face model) or a checkpoint inside one"
        )
    if _begins_at_a_path(config) and not (Path(resume) / "manifest.json").is_file():
        raise ConfigError(
            f"checkpoint.resume={resume} is not a checkpoint (it has no manifest.json): name a "
            "folder like runs/NAME/checkpoints/step-00000100, or auto, or never"
        )


def _begins_at_a_path(config: Config) -> bool:
    """Whether `checkpoint.resume` names the checkpoint that this start goes on from."""
    assert config.run_dir is not None
    # of a later start of a job, its own checkpoints may have pushed out the one it began with
    named = config.checkpoint.resume not in ("auto", "never")
    return named and not goes_on(Path(config.run_dir))


def _check_model(config: Config) -> None:
    """Refuse weights of another model, which ranks would find only when they load them."""
    folders = {"model.weights": config.model.weights}
    if _begins_at_a_path(config):
        folders["checkpoint.resume"] = config.checkpoint.resume
    for key, folder in folders.items():
        if folder is None:
            continue
        with torch.device("meta"):
            model = GPT(config.model, config.position, max_length=config.data.sequence_length)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        try:
            refuse_other_model(Path(folder), shapes)
        except CheckpointError as error:
            raise ConfigError(f"{key}: {error}") from error


def _check_benchmark(config: Config) -> None:
    benchmark = config.trainer.benchmark
    check_benchmark(benchmark)
    if (benchmark.texts or benchmark.tasks) and open_tokenizer(config) is None:
        raise ConfigError(
            "trainer.benchmark: the data has no tokenizer, so nothing turns text into its ids: "
            "name one in data.tokenizer_path"
        )


def _check_fp8(config: Config) -> None:
    """Refuse a GPU without fp8 products. The CPU emulates them, slowly, for tests."""
    if not is_fp8(config) or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    if capability < FP8_SINCE:
        raise ConfigError(
            f"precision.linear={config.precision.linear.name}: {torch.cuda.get_device_name()} has "
            f"compute capability {'.'.join(map(str, capability))}, fp8 products need "
            f"{'.'.join(map(str, FP8_SINCE))}: take precision=bf16"
        )


def _check_deepspeed(config: Config) -> None:
    """Refuse a DeepSpeed that is not there, and keys of its own that it does not know."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed needs the package deepspeed, which is not installed: "
            "pip install 'deepspeed>=0.19.6,<0.20', or use engine=native"
        )
    from flashtrain.engine.deepspeed import check_keys  # imports DeepSpeed, so not before

    check_keys(config)


def bytes_per_parameter(config: Config) -> float:
    """Least memory one process needs for each parameter of its tensor-parallel part.

    Weights in fp32 and AdamW's two moments, 12 bytes (8), over the shard axis; gradients; and the
    gathered weights that stay between forward and backward where `parallel.zero` leaves them whole.
    """
    parallel, data = config.parallel, config.data
    shard, zero = parallel.shard or 1, parallel.zero
    compute: int = DTYPES[config.precision.compute].itemsize
    gathered = compute if zero < 3 else 0
    if config.engine.name is EngineKind.deepspeed:
        options = config.engine.deepspeed.get("zero_optimization", {})
        there: bool = options.get("offload_optimizer", {}).get("device", "none") == "none"
        gradients = compute if zero == 1 else 4 / shard
        return 12 * there / shard + (gathered or compute / shard) + gradients
    ranks = shard * (parallel.replicate or 1)
    if parallel.shard_context:
        shard *= parallel.context
    state = 12 if config.optimizer.moments is Moments.fp32 else 8
    if shard == 1:
        # muon: one moment, not two
        return 12 if config.optimizer.name is OptimizerKind.muon else state + 4
    several = data.batch_size > ranks * (data.micro_batch_size or data.batch_size)
    whole = zero == 1 and several  # gradients wait for the last micro-batch unreduced
    return state / shard + gathered + (4 if whole else 4 / shard)


def _check_memory(config: Config, local_processes: int) -> None:
    """Refuse a model whose weights and optimizer alone are larger than the memory they go to."""
    parameters = n_parameters(config.model, config.position, config.data.sequence_length)
    ranks = (config.parallel.tensor or 1) * config.parallel.pipeline
    needed = parameters * bytes_per_parameter(config) / ranks
    if torch.cuda.is_available():
        where, there = "GPU", torch.cuda.get_device_properties(0).total_memory
    else:
        where = f"machine's share for one of {local_processes} processes"
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_processes
    if needed > there:
        raise ConfigError(
            f"{parameters:,} parameters need {needed / 2**30:,.1f} GiB per process for weights, "
            f"gradients and optimizer state, and this {where} has {there / 2**30:,.1f}: choose a "
            "smaller model, or a higher parallel.tensor, parallel.pipeline, parallel.shard or "
            "parallel.zero"
        )


def _check_copy(config: Config, local_processes: int) -> None:
    """Refuse asynchronous saves whose copies of weights and moments this machine cannot hold."""
    if not config.checkpoint.asynchronous:
        return
    parallel = config.parallel
    parts = (parallel.tensor or 1) * parallel.pipeline * (parallel.shard or 1)
    parameters = n_parameters(config.model, config.position, config.data.sequence_length)
    moment = 4 if config.optimizer.moments is Moments.fp32 else 2
    state = 8 if config.optimizer.name is OptimizerKind.muon else 4 + 2 * moment
    # replicas copy nothing, so all processes together hold the state once at most
    needed = parameters * state * min(1, local_processes / parts)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"checkpoint.asynchronous copies {needed / 2**30:,.1f} GiB of weights and optimizer "
            f"state to the memory of this machine, which has {there / 2**30:,.1f}: set "
            "checkpoint.asynchronous=false, and steps wait until they are on disk"
        )
