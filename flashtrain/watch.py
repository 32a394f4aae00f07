"""A thread that ends a process which can make no more steps, and says where it stood.

Without it a rank that waits for one that is dead, stopped or elsewhere waits for ever, and so do
the GPUs. It looks once a second, and ends this process with status HUNG, from which a launcher can
start the run again, when

- the launcher is gone: nobody would end this process any more;
- a process of the same node is gone, and with it all collectives, and nothing has moved since;
- another node has fallen silent (pulse.py);
- the run was told to stop and does not come to the end of a step that could be saved;
- nothing has moved for `trainer.hang_timeout` minutes, other than a checkpoint that is waited for:
  a slow disk is no hang, and how long ranks wait for one another there has a limit of its own
  (checkpoint/background.py).

Then the stacks of all threads and PyTorch's record of collectives, its flight recorder, are in
hangs/ of the run folder, and one line names the step, the collective and the ranks. The lowest rank
that can speak says it for all, for the run folder is shared.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import Store  # type: ignore[attr-defined]

from flashtrain.config import TrainerConfig
from flashtrain.hang_report import Report, end_silent_neighbours, say, write
from flashtrain.interruption import Interruption
from flashtrain.launch import HUNG
from flashtrain.pulse import Pulse

PROC = Path("/proc")  # Linux has it, macOS has not
HANGS = "hangs"  # folder of reports, in the run folder
LOOK_S = 1.0
ALONE_S = 20.0  # after the end of a neighbour: longer than an error takes to come by itself
STOPPING_S = 45.0  # for the step that a run told to stop is at; longer where steps are
ALL_REPORTED_S = 2.0  # until every rank that hangs for the same reason has said so
LEAVING_S = 50.0  # to leave after an error: what is left to write, process groups, trackers


class Watch:
    """Use it in a `with` block around training. `at` is called by the thread that trains."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        config: TrainerConfig,
        stop: Interruption,
        store: Store | None = None,
        saving: Callable[[], bool] = lambda: False,
    ) -> None:
        """folder: where reports go. store: of this start, where there are several processes.
        saving: whether the thread that trains waits for a checkpoint to be on disk."""
        self.folder, self.rank, self.stop = folder, rank, stop
        self.limit = 60 * config.hang_timeout
        self.pulse = Pulse.of_this_process(store, rank, config.node_timeout)
        self.what = "the start"
        self.moved = self.began = time.monotonic()
        self.saving, self.saved = saving, self.moved  # saved: when that was last so
        self.stepping = True  # what is saved comes before or after this
        self.last = False  # the last step is done, so neighbours may be gone before this process
        self.longest = 0.0  # s, of the steps so far
        self.leaving: float | None = None  # since when an error takes this process down
        self.alone: float | None = None  # since when a neighbour is gone
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def at(self, what: str, *, stepping: bool, last: bool = False) -> None:
        """Something moved: what follows is `what`. stepping: its end can be saved."""
        now = time.monotonic()
        if self.stepping and self.what != "the start":
            self.longest = max(self.longest, now - self.moved)
        # a rollback from the last step trains on
        self.last = last or (self.last and not stepping)
        self.what, self.stepping, self.moved = what, stepping, now

    def verdict(self, now: float) -> str | None:
        """Why this process must end now, if it must."""
        idle = now - self.moved
        if self.launcher is not None and os.getppid() != self.launcher:
            return "the launcher is gone"
        if self.leaving is not None:
            slow = now - self.leaving > LEAVING_S
            return f"an error did not end this process in {LEAVING_S:.0f} s" if slow else None
        why = None if self.last else self._left_alone(now, idle)
        if why is not None:
            return why
        waited = min(idle, now - self.stop.asked_at)
        if self.stop.asked_at and self.stepping and waited > max(STOPPING_S, 5 * self.longest):
            return "told to stop, and the step does not end"
        if self.saving():
            self.saved = now
        if min(idle, now - self.saved) > self.limit:
            return f"nothing has moved for {self.limit / 60:g} min (trainer.hang_timeout)"
        return None

    def _left_alone(self, now: float, idle: float) -> str | None:
        """By which process or node, if training stands still since then."""
        if self.launcher is not None and PROC.is_dir():
            if len(children(self.launcher)) >= self.neighbours:
                self.alone = None
            elif self.alone is None:
                self.alone = now
            elif min(idle, now - self.alone) > ALONE_S:
                return "a process of this node is gone"
        if self.pulse is not None and self.pulse.lost and idle > self.pulse.limit:
            return self.pulse.lost
        return None

    def __enter__(self) -> Self:
        Report.path(self.folder, self.rank).unlink(missing_ok=True)  # of an earlier start
        self._thread.start()
        if self.pulse is not None:
            self.pulse.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pulse is not None:
            self.pulse.__exit__(kind, error, trace)
        if error is None or self.launcher is None:
            self._done.set()
            self._thread.join()
        else:  # the thread stays, should the rest of the way out hang
            self.leaving = time.monotonic()

    def _run(self) -> None:
        while not self._done.wait(LOOK_S):
            why = self.verdict(time.monotonic())
            if why is not None:
                self._end(why)

    def _end(self, why: str) -> None:
        if self.leaving is not None:
            sys.stderr.write(f"flashtrain: rank {self.rank}: {why}, so it ends now\n")
            sys.stderr.flush()
            os._exit(1)
        try:
            report = write(self.folder, self.rank, self.what, why)
            if "launcher" not in why:
                time.sleep(ALL_REPORTED_S)
                say(self.folder, report)
                if self.launcher is not None:
                    end_silent_neighbours(self.folder, report, children(self.launcher))
            sys.stderr.flush()
        finally:
            os._exit(HUNG)  # the thread that trains cannot be ended otherwise


def children(parent: int) -> list[int]:
    """Living processes that `parent` started."""
    found = []
    for path in PROC.glob("[0-9]*/stat"):
        try:  # bytes: in brackets stands a name, which the kernel cuts in the middle of a letter
            state, ppid = path.read_bytes().rpartition(b")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if int(ppid) == parent and state not in b"ZX":
            found.append(int(path.parent.name))
    return found
