"""Saving beside training: the loop waits for a copy in host memory, a thread writes it to disk.
Or, where that is not wanted, the loop writes it itself.

A thread is enough: hashing, writing and fsync let the interpreter go. It calls the same `save` as a
synchronous run, on a copy, so both write the same bytes. There the ranks agree that all have
written before one renames, over a gloo group of their own that only these threads use: training's
collectives cannot come between theirs, a full disk can still be reported where a file could not,
and a rank that died breaks the connection instead of being waited for.

One checkpoint is in flight at a time. Whoever starts the next one first waits for it, so a slow
disk slows training down and never fills memory.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashtrain.checkpoint.integrity import CheckpointError
from flashtrain.checkpoint.peers import Peers
from flashtrain.checkpoint.retention import NEWEST, Retention
from flashtrain.checkpoint.shelf import checkpoint_path
from flashtrain.checkpoint.snapshot import HostMemory
from flashtrain.checkpoint.state import State, rng_state
from flashtrain.checkpoint.store import save

log = logging.getLogger("flashtrain.checkpoint")
# how much longer than the fastest rank the slowest one may write
PATIENCE = timedelta(minutes=30)
NOTICED_S = 1.0  # a wait for the disk that is worth a warning


@dataclass(frozen=True)
class Saved:
    """What became of one checkpoint; equal on all ranks but for the seconds."""

    step: int
    path: Path
    stall_s: float  # the loop stood still
    waited_s: float  # of that, for the checkpoint before
    written_s: float  # from the end of the copy until it was published or given up
    failure: str | None = None  # one sentence


def own_peers(world_size: int) -> Peers:
    """All ranks over gloo connections that nothing else uses. Collective."""
    if world_size == 1:
        return Peers()
    return Peers(dist.new_group(backend="gloo", timeout=PATIENCE))


class Saver:
    """Checkpoints of one run, one after the other. Every rank calls `start` for the same steps."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        peers: Peers,
        *,
        asynchronous: bool = True,
        writes: bool = True,
        keep: Retention = NEWEST,
    ) -> None:
        """peers: of `own_peers`, who have the patience; nothing else may use them.

        writes, keep: as for `store.save`.
        """
        self.folder, self.device, self.peers = folder, device, peers
        self.asynchronous, self.writes, self.keep = asynchronous, writes, keep
        self.memory: HostMemory | None = None
        self._preparing: threading.Thread | None = None
        self._writing: threading.Thread | None = None
        self._done: list[Saved] = []
        self._awaited = False

    def path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def prepare(self, state: State) -> None:
        """Begin to make the host memory, so that the first save does not wait for it.

        state: of the layout that will be saved, so after the first step, which makes moments.
        """
        wanted = self.asynchronous and self.writes
        if wanted and self.memory is None and self._preparing is None:
            self._preparing = _thread("checkpoint memory", lambda: self._make_memory(state))

    def start(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Save `state` as it is now; it may change as soon as this returns.

        meta: JSON types, of which rank 0's is taken, and which nothing changes any more.
        What became of it, a failure too, is said by `results`: at once where not asynchronous.
        """
        if not self.asynchronous:
            with self._awaiting():
                self._write(step, state, meta, rng_state())
            return
        began = time.perf_counter()
        waited = 0.0
        if self._writing is not None:
            with self._awaiting():
                self._writing.join()
            waited = time.perf_counter() - began
        if waited > NOTICED_S and self.peers.rank == 0:
            log.warning(
                "step %d waited %.1f s until the checkpoint before it was on disk: the disk is too "
                "slow for checkpoint.every, so raise it",
                step,
                waited,
            )
        copy, generators = self._copy(state), rng_state()
        stall = time.perf_counter() - began
        self._writing = _thread(
            f"checkpoint {step}",
            lambda: self._write(step, copy, meta, generators, (stall, waited)),
        )

    @property
    def busy(self) -> bool:
        """Whether memory is being made or a checkpoint written."""
        threads = (self._preparing, self._writing)
        return any(thread is not None and thread.is_alive() for thread in threads)

    def is_awaited(self) -> bool:
        """Whether the loop stands still until a checkpoint is on disk."""
        return self._awaited

    def results(self) -> list[Saved]:
        """What has ended since the last call, in order; waits for nothing."""
        done = self._done[:]
        del self._done[: len(done)]
        return done

    def finish(self, timeout: float | None = None) -> bool:
        """Wait for the checkpoint in flight, if any; its result stays for `results`.

        timeout: seconds, after which this returns False and the thread goes on.
        """
        for thread in (self._preparing, self._writing):
            if thread is not None:
                with self._awaiting():
                    thread.join(timeout)
                if thread.is_alive():
                    return False
        self._preparing = self._writing = None
        return True

    def close(self, timeout: float | None = None) -> None:
        """`finish`, and give the host memory back."""
        if self.finish(timeout) and self.memory is not None:
            self.memory.release()
            self.memory = None

    @contextmanager
    def _awaiting(self) -> Iterator[None]:
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _make_memory(self, state: State) -> HostMemory:
        if self.memory is not None:
            self.memory.release()
        self.memory = HostMemory(state, self.device)
        return self.memory

    def _copy(self, state: State) -> State:
        if not self.writes:
            return State({}, {})
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        memory = self.memory
        if memory is None or not memory.fits(state):
            memory = self._make_memory(state)
        return memory.copy(state)

    def _write(
        self,
        step: int,
        state: State,
        meta: dict[str, Any],
        rng: dict[str, Any],
        stood: tuple[float, float] | None = None,
    ) -> None:
        """stood: how long the loop stood still for it, and of that for the one before."""
        began = time.perf_counter()
        path, failure = self.path(step), None
        try:
            save(
                self.folder,
                step,
                state,
                meta,
                peers=self.peers,
                writes=self.writes,
                keep=self.keep,
                rng=rng,
            )
        except CheckpointError as error:
            failure = str(error)
        except Exception as error:  # of the ranks' connections, perhaps
            if not self.asynchronous:
                raise
            failure = f"cannot write checkpoint {path}: {error}"
        seconds = time.perf_counter() - began
        self._done.append(Saved(step, path, *(stood or (seconds, 0.0)), seconds, failure))


def _thread(name: str, work: Callable[[], object]) -> threading.Thread:
    # a daemon: a process that must end at once leaves a `.tmp` behind, as one that is killed does
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
