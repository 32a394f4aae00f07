"""A run that is told to stop: by a signal, by the clock. All ranks stop after the same step.

A handler only notes the wish. After each step the ranks share theirs in one small all-reduce that
nobody waits for: its answer is read a step later, when it has long arrived, so the host never waits
for the device and the run ends at most one step after the wish. Slurm's notice is a signal too
(`#SBATCH --signal=USR1@120`).
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from flashtrain.launch import EARLIER_S

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CLOCK = len(SIGNALS)  # what stands for the time limit where a signal's place in SIGNALS stands
# torchrun passes a signal on to workers that may have had it already (Ctrl-C reaches the whole
# terminal), within milliseconds; a person who asks again takes longer
AGAIN_S = 2.0


class Interruption:
    """Use it in a `with` block: handlers are put back. Only the main thread may make one."""

    def __init__(self, time_limit: float | None = None) -> None:
        """time_limit: minutes after which to stop, if any, from now or, where our launcher starts
        again, from its first start."""
        earlier = float(os.environ.get(EARLIER_S, 0))
        self.deadline = time.monotonic() + 60 * time_limit - earlier if time_limit else None
        self.wish = 0  # 1 + place in SIGNALS, or 1 + CLOCK; the largest of all ranks counts
        self.asked_at = 0.0  # by a signal
        self._before: dict[int, Any] = {}
        self._answer: Callable[[], int] | None = None  # of the step before

    def agreed(self) -> str | None:
        """Why all ranks stop now, or None. Collective; call it once after each step."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.wish = max(self.wish, 1 + CLOCK)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return _name(self.wish)
        answer = self._answer() if self._answer is not None else 0
        self._answer = _largest(self.wish)
        return _name(answer)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at and number == signal.SIGINT and now - self.asked_at > AGAIN_S:
            raise KeyboardInterrupt  # asked twice: now, without saving
        if not self.asked_at:  # the clock's wish is nobody's impatience
            self.asked_at = now
        self.wish = max(self.wish, 1 + SIGNALS.index(signal.Signals(number)))


def _name(wish: int) -> str | None:
    if wish == 0:
        return None
    return "the time limit" if wish == 1 + CLOCK else SIGNALS[wish - 1].name


def _largest(wish: int) -> Callable[[], int]:
    """Start the all-reduce of every rank's wish; what to call for its answer."""
    if dist.get_backend() != dist.Backend.NCCL:
        shared = torch.tensor([wish])
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, async_op=True)

        def wait() -> int:
            work.wait()
            return int(shared)

        return wait
    device = torch.device("cuda", torch.cuda.current_device())
    shared = torch.tensor([wish], pin_memory=True).to(device, non_blocking=True)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    arrived = torch.empty(1, dtype=torch.int64, pin_memory=True)
    arrived.copy_(shared, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> int:
        event.synchronize()  # of the step before: the device has a whole step queued behind it
        return int(arrived)

    return read
