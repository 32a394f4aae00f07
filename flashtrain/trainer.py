"""The loop: batches in, optimizer steps out, hooks after each. It knows steps and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flashtrain.data.loader import DataLoader
from flashtrain.engine.base import Engine


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


class Trainer:
    def __init__(
        self,
        engine: Engine,
        loader: DataLoader,
        learning_rate: Callable[[int], float],
        hooks: Sequence[Hook],
        interrupted: Callable[[], str | None],
    ) -> None:
        """interrupted: asked once after every step why all ranks should stop; collective."""
        self.engine, self.loader, self.hooks = engine, loader, hooks
        self.learning_rate, self.interrupted = learning_rate, interrupted

    def fit(self, start: int, end: int) -> None:
        """Optimizer steps `start` ... `end - 1`, or until interrupted.

        Step s reads global batch s, whoever trains it.
        """
        for number in range(start, end):
            loss = self.engine.forward_backward(self.loader.step(number))
            rate = self.learning_rate(number)
            norm = self.engine.step(rate)
            last = number + 1 == end
            why = None if last else self.interrupted()
            step = Step(number + 1, loss, norm, rate, last or why is not None, why)
            for hook in self.hooks:
                hook.after_step(step)
            if why is not None:
                return
