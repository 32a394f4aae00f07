"""Who follows a run: the console, files in the run folder, W&B, TensorBoard. Rank 0 only.

A tracker is never a reason to stop training. What one cannot do it says in one warning.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from flashtrain.config import Config, to_dict
from flashtrain.tracking.console import Console
from flashtrain.tracking.files import Files
from flashtrain.tracking.tensorboard import TensorBoard
from flashtrain.tracking.wandb import Wandb


class Tracker(Protocol):
    def start(self, config: dict[str, Any], resumed_id: str | None) -> None:
        """config: the resolved one, JSON types. resumed_id: "id" of `state()` before, if any."""
        ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def finish(self, status: str) -> None:
        """status: `finished`, `stopped` (before its last step, on purpose) or `failed`."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps so that `start` can go on; JSON types."""
        ...


class Trackers:
    """All that a config asks for, under one name."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Raises ConfigError for W&B or TensorBoard asked for by name and not installed."""
        self.config: Config | None = config
        self.folder = folder
        self.last_step = 0
        self.console = Console(config, folder) if config.tracking.console else None
        self.files = Files(folder)
        self.all: list[Tracker] = [self.files]
        if self.console is not None:
            self.all.insert(0, self.console)
        self.tensorboard = TensorBoard(folder) if config.tracking.tensorboard else None
        if self.tensorboard is not None:
            self.all.append(self.tensorboard)
        self.all.append(Wandb(config.tracking.wandb, config.name, folder))

    @classmethod
    def silent(cls) -> Self:
        """For every rank but 0: takes all calls, does nothing."""
        trackers = cls.__new__(cls)
        trackers.config, trackers.console, trackers.all, trackers.last_step = None, None, [], 0
        return trackers

    def start(self, step: int, state: dict[str, Any], notes: Sequence[str]) -> None:
        """step: optimizer steps done already. state: as `state()` gave it. notes: what was decided
        on the way here, such as which checkpoint was taken; they go on the start card."""
        if self.config is None:
            return
        self.last_step = step
        self.files.cut(step)
        if self.tensorboard is not None:
            self.tensorboard.cut(step)
        if self.console is not None:
            self.console.begin(step, notes)
        for tracker in self.all:
            tracker.start(to_dict(self.config), state.get("id"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.last_step = max(step, self.last_step)
        for tracker in self.all:
            tracker.log(step, metrics)

    def text(self, step: int, name: str, text: str) -> None:
        for tracker in self.all:
            tracker.text(step, name, text)

    def note(self, text: str) -> None:
        """A line on the console."""
        if self.console is not None:
            self.console.note(text)

    def state(self) -> dict[str, Any]:
        return {key: value for tracker in self.all for key, value in tracker.state().items()}

    def finish(self, failed: bool) -> None:
        if self.config is None:
            return
        done = self.last_step >= self.config.trainer.steps
        status = "failed" if failed else "finished" if done else "stopped"
        for tracker in reversed(self.all):  # the console sums up last
            tracker.finish(status)
