"""nanoGPT's training step, of a model of the same shape, for scripts/bench_train.py to race with.

Its `model.py` is imported from a folder of the user's; the step is that of its training loop: its
GPT under torch.compile, autocast to bf16, its choice of AdamW (fused on CUDA), its clipping.
"""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashtrain.config import Compute, Config, ConfigError, Mlp, Norm, OptimizerKind
from flashtrain.data.loader import Batch
from flashtrain.parallel.loss import IGNORED


def peer_step(
    folder: Path, config: Config, device: torch.device
) -> Callable[[list[Batch]], Tensor]:
    """From micro-batches to the loss of one whole step of nanoGPT, 0-dim, on the device.

    Raises ConfigError for a model that nanoGPT has not, and for a folder without its model.py.
    """
    model, optimizer, data = config.model, config.optimizer, config.data
    assert model.vocabulary is not None and model.d_ff is not None
    for fits, what in (
        (model.norm is Norm.layernorm, f"model.norm={model.norm.name}"),
        (model.mlp is Mlp.gelu, f"model.mlp={model.mlp.name}"),
        (model.d_ff == 4 * model.d_model, f"model.d_ff={model.d_ff}"),
        (model.n_kv_heads == model.n_heads, f"model.n_kv_heads={model.n_kv_heads}"),
        (model.tied_head, f"model.tied_head={model.tied_head}"),
        (optimizer.name is OptimizerKind.adamw, f"optimizer.name={optimizer.name.name}"),
    ):
        if not fits:
            raise ConfigError(f"{what}: nanoGPT has no such model or optimizer to race with")
    its = load_model(folder)
    net = its.GPT(
        its.GPTConfig(
            block_size=data.sequence_length,
            vocab_size=model.vocabulary,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            n_embd=model.d_model,
            dropout=0.0,
            bias=model.bias,
        )
    ).to(device)
    betas = (optimizer.beta1, optimizer.beta2)
    its_optimizer = net.configure_optimizers(
        optimizer.weight_decay, optimizer.lr * 0.1, betas, device.type
    )
    run = torch.compile(net) if device.type == "cuda" else net
    cast: Any = nullcontext()
    if config.precision.compute is Compute.bf16:
        cast = torch.autocast(device.type, torch.bfloat16)

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=device)
        for batch in batches:
            labels = batch.labels.where(batch.labels != IGNORED, -1)  # -1: what it ignores
            with cast:
                _, loss = run(batch.tokens, labels)
            loss = loss / len(batches)
            loss.backward()
            total += loss.detach()
        if optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip_norm)
        its_optimizer.step()
        its_optimizer.zero_grad(set_to_none=True)
        return total

    return step


def load_model(folder: Path) -> ModuleType:
    """Its model.py as a module. Raises ConfigError where there is none."""
    path = folder / "model.py"
    if not path.is_file():
        raise ConfigError(f"--peer {folder}: no model.py there; name nanoGPT's folder")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
