"""Looking into a run: a trace of some of its steps, NVTX ranges, what to do when memory runs out.

scripts/profile_step.py measures a configuration on its own; this is for the run that is under way.
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flashtrain.config import (
    Config,
    ConfigError,
    EngineKind,
    Moments,
    OptimizerKind,
    Recompute,
)
from flashtrain.metrics import GIB
from flashtrain.planning.memory import predict_memory
from flashtrain.run import Run
from flashtrain.trainer import Step

log = logging.getLogger("flashtrain.profiling")

ENTRIES = 200_000  # allocations that the history keeps, the newest
ROWS = 25  # operations in the table
CHUNKS = 8  # that a run out of memory is told to cut its MLPs into
SNAPSHOT = "memory-rank{}.pickle"  # opens at https://docs.pytorch.org/memory_viz


class Profile:
    """`trainer.profile=[first,last]`: rank 0 traces these steps into profile/ of the run folder.

    The trace opens at https://ui.perfetto.dev. Also switches on what `trainer.nvtx` and
    `trainer.memory_history` ask for.
    """

    def __init__(self, run: Run, loader: Any) -> None:
        """loader: what the steps read from. Raises ConfigError for NVTX without CUDA."""
        trainer = run.config.trainer
        self.run, self.window = run, trainer.profile
        self.profiler: profile | None = None
        self.cuda = run.device.type == "cuda"
        if trainer.profile or trainer.nvtx:
            _name(loader, "step", "data")
            _name(run.engine, "forward_backward", "forward_backward")
            _name(run.engine, "step", "optimizer")
        if (trainer.nvtx or trainer.memory_history) and not self.cuda:
            raise ConfigError(
                f"trainer.nvtx={trainer.nvtx} and trainer.memory_history={trainer.memory_history} "
                "are about a CUDA GPU, and this run has none: leave them false"
            )
        if trainer.memory_history:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self.nvtx: Any = None
        if trainer.nvtx:
            self.nvtx = torch.autograd.profiler.emit_nvtx()
            self.nvtx.__enter__()

    def after_step(self, step: Step) -> None:
        if step.last and self.nvtx is not None:
            self.nvtx.__exit__(None, None, None)
            self.nvtx = None
        if not self.window or self.run.mesh.rank != 0:
            return
        first, last = self.window
        if self.profiler is not None and (step.number >= last or step.last):
            self._finish(first, step.number)
        elif step.number == first - 1 and not step.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def _finish(self, first: int, last: int) -> None:
        assert self.profiler is not None
        if self.cuda:
            torch.cuda.synchronize()
        self.profiler.stop()
        folder = self.run.folder / "profile"
        name = f"steps-{first}-{last}"
        try:
            folder.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            by = "self_device_time_total" if self.cuda else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=by, row_limit=ROWS)
            (folder / f"{name}.txt").write_text(table)
        except OSError as error:
            log.warning("the trace of steps %d to %d is lost: %s", first, last, error)
        else:
            log.info("trace of steps %d to %d: %s", first, last, folder / f"{name}.json.gz")
        self.profiler = None


def _name(owner: Any, name: str, label: str) -> None:
    """Run `owner.name(..)` inside a range of traces and of NVTX."""
    inner: Callable[..., Any] = getattr(owner, name)

    def named(*arguments: Any, **keywords: Any) -> Any:
        with record_function(label):
            return inner(*arguments, **keywords)

    setattr(owner, name, named)


def out_of_memory(config: Config, error: torch.OutOfMemoryError) -> str:
    """What a run that has filled its GPU says: one line, and a snapshot where one was asked for."""
    rank = int(os.environ.get("RANK", 0))
    _, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    line = f"rank {rank} is out of GPU memory. {_first_sentence(error)} {advice(config, total)}"
    if not config.trainer.memory_history:
        return f"{line}; trainer.memory_history=true leaves a snapshot of who holds what"
    assert config.run_dir is not None
    path = Path(config.run_dir) / SNAPSHOT.format(rank)
    torch.cuda.memory._dump_snapshot(str(path))
    return f"{line}; snapshot, for https://docs.pytorch.org/memory_viz: {path}"


def advice(config: Config, total: int) -> str:
    """What the plan (planning/memory.py) says is large, and which keys make it smaller by how much.

    total: bytes of one GPU, 0 if unknown.
    """
    try:
        now = predict_memory(config)
    except ValueError:  # an engine or a schedule that is not predicted
        return "Try a smaller data.micro_batch_size, trainer.recompute=full, more parallel.shard"
    parts = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in vars(now).items() if size >= GIB / 20
    )
    of = f" of {total / GIB:,.1f}" if total else ""
    ways = []
    for override, other in smaller(config):
        planned = predict_memory(other).total
        if planned < now.total:
            ways.append((override, planned))
    tries = ", ".join(f"{override} ({planned / GIB:,.1f} GiB)" for override, planned in ways)
    return f"Planned are {now.total / GIB:,.1f} GiB{of}: {parts}. Try {tries or 'more GPUs'}"


def smaller(config: Config) -> list[tuple[str, Config]]:
    """Overrides that may need less memory on as many GPUs, and what they make of the config."""
    data, parallel, trainer = config.data, config.parallel, config.trainer
    micro, replicate = data.micro_batch_size or 1, parallel.replicate or 1
    found = []
    if micro > 1 and micro % 2 == 0:
        half = dataclasses.replace(data, micro_batch_size=micro // 2)
        found.append(
            (f"data.micro_batch_size={micro // 2}", dataclasses.replace(config, data=half))
        )
    kinds = list(Recompute)  # each keeps less than the one before
    for kind in kinds[kinds.index(trainer.recompute) + 1 :]:
        if kind is Recompute.selective and trainer.mlp_chunks > 1:  # refused, see layout.py
            continue
        again = dataclasses.replace(trainer, recompute=kind)
        found.append((f"trainer.recompute={kind.name}", dataclasses.replace(config, trainer=again)))
    if config.engine.name is EngineKind.native and parallel.pipeline == 1:
        if trainer.mlp_chunks == 1 and trainer.recompute is not Recompute.selective:
            parts = dataclasses.replace(trainer, mlp_chunks=CHUNKS)
            found.append(
                (f"trainer.mlp_chunks={CHUNKS}", dataclasses.replace(config, trainer=parts))
            )
        if trainer.recompute is Recompute.full and not trainer.offload_activations:
            away = dataclasses.replace(trainer, offload_activations=True)
            found.append(
                ("trainer.offload_activations=true", dataclasses.replace(config, trainer=away))
            )
    if parallel.shard == 1 and replicate > 1:
        cut = dataclasses.replace(parallel, shard=replicate, replicate=1)
        found.append(("parallel=fsdp", dataclasses.replace(config, parallel=cut)))
    if config.optimizer.name is OptimizerKind.adamw and config.optimizer.moments is Moments.fp32:
        halved = dataclasses.replace(config.optimizer, moments=Moments.bf16)
        found.append(("optimizer.moments=bf16", dataclasses.replace(config, optimizer=halved)))
    if not config.loss.fused:
        fused = dataclasses.replace(config.loss, fused=True)
        found.append(("loss.fused=true", dataclasses.replace(config, loss=fused)))
    return found


def _first_sentence(error: BaseException) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB. ...` -> `Tried to allocate 2.00 GiB.`"""
    parts = " ".join(str(error).split()).split(". ")
    return next((f"{part}." for part in parts if part.startswith("Tried to allocate")), "")
