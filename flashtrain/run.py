"""One run as it lies on disk: its folder, its checkpoints, who follows it, how fast it goes.

<run_dir>/config.json              resolved configuration of the latest start
<run_dir>/tokenizer.json           what turns its ids back into text
<run_dir>/checkpoints/step-N/      see checkpoint/store.py
<run_dir>/metrics.jsonl            one line a logged step; samples.jsonl likewise
<run_dir>/ended.json               why the latest start ended, if it saved what it had trained
<run_dir>/wandb/                   W&B's own files
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from flashtrain import checkpoint
from flashtrain.build import start_from_vectors
from flashtrain.config import Config, to_dict
from flashtrain.data.source import open_tokenizer
from flashtrain.door import describe_attention
from flashtrain.engine.base import Engine
from flashtrain.launch import ENDED
from flashtrain.metrics import Speedometer
from flashtrain.parallel.mesh import Mesh
from flashtrain.tracking import Trackers


class Run:
    """Everything hooks share. Use it in a `with` block: trackers are told how the run ended."""

    def __init__(self, config: Config, engine: Engine, mesh: Mesh, device: torch.device) -> None:
        assert config.run_dir is not None
        self.config, self.engine, self.mesh, self.device = config, engine, mesh, device
        self.folder = Path(config.run_dir)
        self.why = "finished"
        self.peers = checkpoint.Peers(dist.group.WORLD if mesh.world_size > 1 else None)
        self.tokenizer = open_tokenizer(config)
        self.speed = Speedometer(config, mesh.world_size, device)
        self.trackers = Trackers(config, self.folder) if mesh.rank == 0 else Trackers.silent()

    def resume(self) -> int:
        """Fill the engine from a checkpoint, or leave it as the seed made it; the first step."""
        path = self._choose()
        meta: dict[str, Any] = {}
        if path is not None:
            meta = checkpoint.read_meta(path)
            checkpoint.load(path, self.engine.state(checkpoint.saved_names(path)))
            self.engine.loaded()
            rng = checkpoint.read_rng(path, self.mesh.rank, self.mesh.world_size)
            if rng is not None:
                checkpoint.set_rng_state(rng)
        first = int(meta.get("step", 0))
        if self.mesh.rank == 0:
            self._write_folder()
        start = "starts from its seed"
        if path is None and self.config.model.weights:
            weights = checkpoint.locate(Path(self.config.model.weights), self.peers)
            checkpoint.load(weights, self.engine.state())
            self.engine.loaded()
            start = f"starts from the weights of {weights}"
        notes = [
            f"resumes from {path}" if path else start,
            f"attention: {describe_attention(self.config)}",
        ]
        if path is None and self.config.model.word_vectors and self.tokenizer is not None:
            table = self.engine.state().tensors["model/embedding.weight"]
            notes.append(start_from_vectors(table, self.config, self.tokenizer))
            self.engine.loaded()
        self.trackers.start(first, meta.get("tracking", {}), notes)
        return first

    def _choose(self) -> Path | None:
        """The checkpoint that `checkpoint.resume` means; collective, equal on all ranks."""
        resume = self.config.checkpoint.resume
        if resume == "never":
            return None
        if resume == "auto":
            return checkpoint.find_latest(self.folder / "checkpoints", self.peers)
        checkpoint.verify(Path(resume), self.peers)
        return Path(resume)

    def save(self, step: int) -> Path:
        """Collective. Weights come from the first of the ranks that hold the same part."""
        meta = {
            "config": to_dict(self.config),
            "tracking": self.peers.broadcast(self.trackers.state()),
        }
        return checkpoint.save(
            self.folder / "checkpoints",
            step,
            self.engine.state(),
            meta,
            peers=self.peers,
            writes=self.mesh.replicate.rank == 0,
            keep=self.config.checkpoint.keep,
        )

    def interrupted(self, step: int, why: str) -> None:
        """This start ends before its last step, which is saved."""
        self.why = why
        self.trackers.note(f"{why}: saved step {step}; the same command goes on from there")

    def _write_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ENDED).unlink(missing_ok=True)
        (self.folder / "config.json").write_text(json.dumps(to_dict(self.config), indent=2))
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder / "tokenizer.json")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.trackers.finish(failed=kind is not None)
        if kind is None and self.mesh.rank == 0:
            (self.folder / ENDED).write_text(json.dumps({"why": self.why}) + "\n")
