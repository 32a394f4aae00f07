"""The loop: batches in, optimizer steps out, hooks after each. It knows steps and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flashtrain.data.loader import Batch, DataLoader


class TrainingError(RuntimeError):
    """A run whose numbers went bad, said in one sentence. Raised on all ranks alike."""


class BadNumbersError(TrainingError):
    """Numbers that went bad, in a run that wants to go back and on without what it was fed."""

    def __init__(self, sentence: str, good: int) -> None:
        """good: optimizer steps done before the first bad one."""
        super().__init__(sentence)
        self.good = good


@dataclass
class Step:
    """What just happened. Tensors stay on the device until a hook reads them."""

    number: int  # optimizer steps done so far, this one included
    loss: Tensor  # mean over the valid tokens of the global batch
    gradient_norm: Tensor  # before clipping
    learning_rate: float
    last: bool  # no further step follows in this process
    interrupted: str | None = None  # why the run stops here, before its end; then `last` is set


class Hook(Protocol):
    def after_step(self, step: Step) -> None:
        """Called on every rank after every optimizer step, in the order of the hooks."""
        ...


class Trains(Protocol):
    """Of an engine (engine/base.py), what the loop calls."""

    def forward_backward(self, batches: list[Batch]) -> Tensor: ...

    def step(self, learning_rate: float) -> Tensor: ...


class Past(Protocol):
    """What the trainer must know of rollbacks; see rollback.py."""

    def batch(self, step: int) -> int:
        """The global batch that step `step` (from 0) trains on."""
        ...

    def go_back(self, bad: BadNumbersError, done: int) -> int:
        """After `done` steps: undo the last ones and return how many are left, or raise."""
        ...


class Progress(Protocol):
    def at(self, what: str, *, stepping: bool, last: bool = False) -> None:
        """What the thread that trains does from now on; see watch.py."""
        ...


class Trainer:
    def __init__(
        self,
        engine: Trains,
        loader: DataLoader,
        learning_rate: Callable[[int], float],
        hooks: Sequence[Hook],
        interrupted: Callable[[], str | None],
        past: Past | None = None,
        progress: Progress | None = None,
    ) -> None:
        """interrupted: asked once after every step why all ranks should stop; collective.

        Without `past`, step s trains on batch s and bad numbers end the run.
        """
        self.engine, self.loader, self.hooks = engine, loader, hooks
        self.learning_rate, self.interrupted = learning_rate, interrupted
        self.past, self.progress = past, progress

    def fit(self, start: int, end: int) -> None:
        """Optimizer steps `start` ... `end - 1`, or until interrupted.

        Step s reads global batch s, or a later one after a rollback, whoever trains it.
        """
        number = start
        while number < end:
            try:
                step = self._step(number, end)
                for hook in self.hooks:
                    hook.after_step(step)
            except BadNumbersError as bad:
                if self.past is None:
                    raise
                number = self.past.go_back(bad, number + 1)
                continue
            if step.interrupted is not None:
                return
            number += 1

    def _step(self, number: int, end: int) -> Step:
        self._at(f"step {number + 1}", stepping=True)
        batch = number if self.past is None else self.past.batch(number)
        loss = self.engine.forward_backward(self.loader.step(batch))
        rate = self.learning_rate(number)
        norm = self.engine.step(rate)
        last = number + 1 == end
        why = None if last else self.interrupted()
        step = Step(number + 1, loss, norm, rate, last or why is not None, why)
        self._at(f"what follows step {number + 1}", stepping=False, last=step.last)
        return step

    def _at(self, what: str, *, stepping: bool, last: bool = False) -> None:
        if self.progress is not None:
            self.progress.at(what, stepping=stepping, last=last)
