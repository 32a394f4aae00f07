"""One run as it lies on disk: its folder, its checkpoints, who follows it, how fast it goes.

<run_dir>/config.json              resolved configuration of the latest start
<run_dir>/environment.json         versions and devices of the latest start
<run_dir>/tokenizer.json           what turns its ids back into text
<run_dir>/checkpoints/step-N/      see checkpoint/store.py
<run_dir>/metrics.jsonl            one line a logged step; samples.jsonl likewise
<run_dir>/job.json                 see job.py
<run_dir>/ended.json               why the latest start ended, if it saved what it had trained
<run_dir>/wandb/                   W&B's own files
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from flashtrain import checkpoint, job
from flashtrain.build import start_from_vectors
from flashtrain.checkpoint.background import NOTICED_S
from flashtrain.config import Config, to_dict
from flashtrain.data.mapped import DataError
from flashtrain.data.source import open_tokenizer, sources_now
from flashtrain.data.unchanged import Unchanged
from flashtrain.door import describe_attention
from flashtrain.engine.base import Engine
from flashtrain.launch import ENDED
from flashtrain.metrics import Speedometer
from flashtrain.parallel.mesh import Mesh
from flashtrain.tracking import Trackers
from flashtrain.tracking.environment import environment

log = logging.getLogger("flashtrain.run")
# seconds that a run which ends in an error waits for the checkpoint in flight: the other ranks, who
# have to agree that it is whole, may be gone
GRACE_S = 30.0


class Run:
    """Everything hooks share. Use it in a `with` block: trackers are told how the run ended."""

    def __init__(self, config: Config, engine: Engine, mesh: Mesh, device: torch.device) -> None:
        assert config.run_dir is not None
        self.config, self.engine, self.mesh, self.device = config, engine, mesh, device
        self.folder = Path(config.run_dir)
        self.why = "finished"
        self.peers = checkpoint.Peers(dist.group.WORLD if mesh.world_size > 1 else None)
        saving = config.checkpoint
        self.saver = checkpoint.Saver(
            self.folder / "checkpoints",
            device,
            checkpoint.own_peers(mesh.world_size),
            asynchronous=saving.asynchronous,
            writes=mesh.replicate.rank == 0,
            keep=checkpoint.Retention(saving.keep, saving.keep_every, saving.keep_best),
        )
        self.saving = self.saver.is_awaited
        self.before: job.Stamps = {}  # what it must not go on from, see job.py
        self.skipped: list[list[int]] = []  # global batches left out, see rollback.py
        self.evaluated: tuple[int, float] | None = None  # the latest one: its step, its loss
        self.tokenizer = open_tokenizer(config)
        self.sources = sources_now(config) if mesh.rank == 0 else None
        self.speed = Speedometer(config, mesh.world_size, device)
        self.trackers = Trackers(config, self.folder) if mesh.rank == 0 else Trackers.silent()

    def resume(self) -> int:
        """Fill the engine from a checkpoint, or leave it as the seed made it; the first step."""
        self.saver.finish()  # so that the newest one is seen
        path = self._choose()
        meta: dict[str, Any] = {}
        if path is not None:
            before = checkpoint.read_meta(path).get("sources", {})
            self._need(lambda sources: sources.refuse_other(before, path))
            meta = self.restore(path)
        first = int(meta.get("step", 0))
        if self.mesh.rank == 0:
            self._write_folder()
        start = "starts from its seed"
        if path is None and self.config.model.weights:
            weights = checkpoint.locate(Path(self.config.model.weights), self.peers)
            self._load(weights)
            start = f"starts from the weights of {weights}"
        notes = [
            f"resumes from {path}" if path else start,
            f"attention: {describe_attention(self.config)}",
        ]
        if path is None and self.config.model.word_vectors and self.tokenizer is not None:
            table = self.engine.state().tensors.get("model/embedding.weight")
            if table is not None:  # pipeline ranks after the first may have none
                notes.append(start_from_vectors(table, self.config, self.tokenizer))
            self.engine.loaded()
        self.trackers.start(first, meta.get("tracking", {}), notes)
        return first

    def restore(self, path: Path) -> dict[str, Any]:
        """Weights, optimizer, generators and left-out batches of a checkpoint; its `meta`."""
        meta = checkpoint.read_meta(path)
        self._load(path, checkpoint.saved_names(path))
        rng = checkpoint.read_rng(path, self.mesh.rank, self.mesh.world_size)
        if rng is not None:
            checkpoint.set_rng_state(rng)
        self.skipped = meta.get("skipped", [])
        return meta

    def _load(self, path: Path, saved: Collection[str] = ()) -> None:
        """Collective. Raises CheckpointError on all ranks alike: of a pipeline perhaps one alone
        holds what does not fit, and the others would train on."""
        failure = None
        try:
            checkpoint.load(path, self.engine.state(saved))
        except checkpoint.CheckpointError as error:
            failure = str(error)
        failures = self.peers.gather(failure) or []
        failure = self.peers.broadcast(next(filter(None, failures), None))
        if failure is not None:
            raise checkpoint.CheckpointError(failure)
        self.engine.loaded()

    def _choose(self) -> Path | None:
        """The checkpoint that `checkpoint.resume` means; collective, equal on all ranks."""
        resume = self.config.checkpoint.resume
        if resume == "auto":
            return checkpoint.find_latest(self.folder / "checkpoints", self.peers)
        launchers = self.peers.gather(job.launcher())
        if launchers is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.before = job.before(self.folder, {name for name in launchers if name})
        if self.peers.broadcast(job.stamps_of(self.folder).items() - self.before.items() != set()):
            path = checkpoint.find_latest(self.folder / "checkpoints", self.peers)
            if self.peers.broadcast(self.owns(path)):
                return path  # the launcher started again, see job.py
        if resume == "never":
            return None
        checkpoint.verify(Path(resume), self.peers)
        return Path(resume)

    def owns(self, path: Path | None) -> bool:
        """Whether this job wrote a checkpoint of its folder; rank 0 knows."""
        stamps = job.stamps_of(self.folder).items() - self.before.items()
        return path is not None and path.name in dict(stamps)

    def _need(self, check: Callable[[Unchanged], None]) -> None:
        """`check` by rank 0, whose DataError is raised on all ranks alike; collective."""
        failure = None
        if self.sources is not None:
            try:
                check(self.sources)
            except DataError as error:
                failure = str(error)
        failure = self.peers.broadcast(failure)
        if failure is not None:
            raise DataError(failure)

    def prepare_saving(self) -> None:
        """Make the memory that asynchronous saves need, beside training; after the first step."""
        if self.config.checkpoint.asynchronous:
            self.saver.prepare(self.engine.state())

    def save(self, step: int, wait: bool = True) -> Path:
        """Collective. Weights come from the first of the ranks that hold the same part.

        wait: until the checkpoint is on disk. Else, where checkpoint.asynchronous, training may go
        on at once, and one that cannot be written costs a warning.
        Raises CheckpointError on all ranks alike when one that was waited for cannot be written,
        DataError when the data was changed under the run.
        """
        self._need(lambda sources: sources.refuse_changed())
        meta: dict[str, Any] = {
            "config": to_dict(self.config),
            "tracking": self.trackers.state(),
            "skipped": self.skipped,
            "sources": self.sources.contents if self.sources is not None else {},
        }
        if self.evaluated is not None and self.evaluated[0] == step:
            loss = self.evaluated[1]
            meta[checkpoint.EVALUATION] = loss if math.isfinite(loss) else None
        self.saver.start(step, self.engine.state(), meta)
        if not wait:
            self.report_saved(step)
            return self.saver.path(step)
        self.saver.finish()
        *earlier, this = self.saver.results()
        self._report(step, earlier)
        if this.failure is not None:
            raise checkpoint.CheckpointError(this.failure)
        self._report(step, [this])
        return this.path

    def report_saved(self, step: int) -> None:
        """Log what became of checkpoints since the last call; waits for nothing."""
        self._report(step, self.saver.results())

    def _report(self, step: int, results: Iterable[checkpoint.Saved]) -> None:
        for saved in results:
            if saved.failure is None:
                seconds = {"stall_s": saved.stall_s, "write_s": saved.written_s}
                if saved.waited_s > NOTICED_S:
                    seconds["wait_s"] = saved.waited_s
                self.trackers.log(step, {f"checkpoint/{k}": v for k, v in seconds.items()})
            elif self.mesh.rank == 0:
                log.warning("%s; training goes on and tries again", saved.failure)

    def interrupted(self, step: int, why: str) -> None:
        """This start ends before its last step, which is saved."""
        self.why = why
        self.trackers.note(f"{why}: saved step {step}; the same command goes on from there")

    def _write_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ENDED).unlink(missing_ok=True)
        config, versions = to_dict(self.config), environment(self.mesh.world_size)
        self._replace("config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
        self._replace(
            "environment.json", lambda path: path.write_text(json.dumps(versions, indent=2))
        )
        if self.tokenizer is not None:
            self._replace("tokenizer.json", self.tokenizer.save)

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        """A full disk costs the new file, not the one before and not the run."""
        path, fresh = self.folder / name, self.folder / f"{name}.tmp"
        try:
            write(fresh)
            fresh.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            log.warning("cannot write %s: %s", path, error.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.saver.close(GRACE_S if error is not None else None)
        self.report_saved(self.trackers.last_step)
        self.trackers.finish(failed=kind is not None)
        if kind is None and self.mesh.rank == 0:
            ended = json.dumps({"why": self.why}) + "\n"
            self._replace(ENDED, lambda path: path.write_text(ended))
