"""TensorBoard's event files in the run folder: `tensorboard --logdir runs`."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashtrain.config import ConfigError

log = logging.getLogger("flashtrain.tracking")


def check_tensorboard(wanted: bool) -> None:
    """Raise ConfigError where it is asked for and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard=true needs the package tensorboard, which is not installed: "
            "pip install 'flashtrain[tensorboard]', or set tracking.tensorboard=false"
        )


class TensorBoard:
    """See `tracking.Tracker`."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where the package is missing."""
        check_tensorboard(True)
        self.folder = folder / "tensorboard"
        self.first = 0
        self.writer: Any = None

    def cut(self, step: int) -> None:
        """Rows of steps after `step` are trained again; viewers drop the ones written before."""
        self.first = step + 1

    def start(self, config: dict[str, Any], resumed_id: str | None) -> None:
        def open_writer() -> None:
            from torch.utils.tensorboard import SummaryWriter

            purge = self.first if self.first > 1 else None
            self.writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=30)

        self._try(open_writer)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self._try(
                lambda: [self.writer.add_scalar(key, value, step) for key, value in metrics.items()]
            )

    def text(self, step: int, name: str, text: str) -> None:
        if self.writer is not None:  # an indented block is shown as it is
            block = "\n".join("    " + line for line in text.splitlines())
            self._try(lambda: self.writer.add_text(name, block, step))

    def finish(self, status: str) -> None:
        if self.writer is not None:
            self._try(self.writer.close)
        self.writer = None

    def state(self) -> dict[str, Any]:
        return {}

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, a broken protobuf: never a reason to stop
            log.warning("TensorBoard failed (%s) and is off from here on", error)
            self.writer = None
