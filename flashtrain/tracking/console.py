"""What a human sees: a card at the start, a line a logged step, text samples, a sum at the end.

On a terminal a progress bar stays below the lines; in a log file there are only the lines. What
the `flashtrain` loggers say comes through here too, so that it does not tear the bar.
"""

import contextlib
import errno
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import rich.box
import torch.distributed as dist
from rich.console import Console as Rich
from rich.console import RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from flashtrain.config import Config
from flashtrain.tracking.card import card, count

LOG = logging.getLogger("flashtrain")
UNPRINTABLE = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
del UNPRINTABLE[ord("\n")], UNPRINTABLE[ord("\t")]
WIDTH = 100  # columns where no terminal tells


class Console:
    """See `tracking.Tracker`."""

    def __init__(self, config: Config, folder: Path, file: IO[str] | None = None) -> None:
        """file: where to print, standard output by default."""
        self.config, self.folder = config, folder
        file = file or sys.stdout
        self.rich = _Rich(file=file, highlight=False, width=None if file.isatty() else WIDTH)
        self.steps = config.trainer.steps
        self.bar: Progress | None = None
        self.first, self.step, self.notes = 0, 0, [""]
        self.began = self.clock = time.monotonic()
        self.timed_step: int | None = None  # step that `clock` belongs to
        self.last: dict[str, float] = {}
        self.handler, self.level = _Lines(self), LOG.level
        LOG.addHandler(self.handler)
        LOG.setLevel(logging.INFO)

    def begin(self, step: int, notes: Sequence[str]) -> None:
        """step: optimizer steps done already; notes: what was decided, for the start card."""
        self.first = self.step = step
        self.notes = list(notes)

    def start(self, config: dict[str, Any], resumed_id: str | None) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        world = dist.get_world_size() if dist.is_initialized() else 1
        lines = [*card(self.config, world), ("run folder", str(self.folder))]
        lines += zip(("start", *[""] * len(self.notes)), self.notes, strict=False)
        for label, text in lines:
            table.add_row(Text(label, style="bold"), Text(text))
        self._print(Panel(table, title=Text(self.config.name), title_align="left"))
        if self.rich.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(None),
                TextColumn("{task.fields[left]}"),
                console=self.rich,
                transient=True,
            )
            self.bar.add_task("train", total=self.steps, completed=self.first, left="")
            self.bar.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step > self.step and self.timed_step is None:
            self.clock, self.timed_step = time.monotonic(), step  # leaves out the compiling steps
        self.step = max(step, self.step)
        self.last |= metrics
        left = self.time_left()
        parts = [f"step {step}/{self.steps}", *format_metrics(metrics)]
        if left and "train/loss" in metrics:
            parts.append(f"{left} left")
        self._print(Text("  ".join(parts)))
        if self.bar is not None:
            self.bar.update(
                self.bar.task_ids[0], completed=step, left=f"{left} left" if left else ""
            )

    def time_left(self) -> str:
        """From wall clock since the first logged step, so evaluation and checkpoints count."""
        if self.timed_step is not None and self.step > self.timed_step:
            per_step = (time.monotonic() - self.clock) / (self.step - self.timed_step)
            return duration(per_step * (self.steps - self.step))
        return ""

    def text(self, step: int, name: str, text: str) -> None:
        title = Text(f"{name} at step {step}")
        # a model may utter any byte, and a terminal obeys escape sequences
        body = Text(text.translate(UNPRINTABLE))
        self._print(Panel(body, title=title, title_align="left", box=rich.box.SQUARE))

    def note(self, text: str, warning: bool = False) -> None:
        line = Text(f"warning: {text}", style="yellow") if warning else Text(text)
        self._print(line)

    def finish(self, status: str) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):  # as in `_print`
                self.bar.stop()
            self.bar = None
        LOG.removeHandler(self.handler)
        LOG.setLevel(self.level)
        took = duration(time.monotonic() - self.began)
        parts = [f"{status} at step {self.step}/{self.steps} after {took}"]
        for key, label in (("train/loss", "loss"), ("validation/loss", "validation loss")):
            if key in self.last:
                parts.append(f"{label} {self.last[key]:.4f}")
        parts.append(f"run folder {self.folder}")
        if status != "finished":
            parts.append("the same command goes on from the newest checkpoint, if there is one")
        style = "bold red" if status == "failed" else "bold"
        self._print(Text("  ".join(parts), style=style))

    def state(self) -> dict[str, Any]:
        return {}

    def _print(self, what: RenderableType) -> None:
        """A reader that went away (`| head`, a closed terminal) ends the output, not the run; on a
        full disk only what does not fit is lost."""
        if self.rich.quiet:
            return
        try:
            self.rich.print(what, soft_wrap=isinstance(what, Text))
        except (OSError, ValueError) as error:
            self.rich.quiet = not _is_full(error)
            self.rich._buffer.clear()  # rich would print it again with the next line


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _Rich(Rich):
    def on_broken_pipe(self) -> None:
        """Called while the BrokenPipeError is handled; rich's own would end the process."""
        raise


class _Lines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.note(record.getMessage(), record.levelno >= logging.WARNING)


def format_metrics(metrics: dict[str, float]) -> list[str]:
    """Known metrics first, in a fixed order, then the rest under their names. Takes NaN and inf."""
    known: dict[str, Callable[[float], str]] = {
        "train/loss": lambda v: f"loss {v:.4f}",
        "validation/loss": lambda v: f"validation loss {v:.4f}",
        "validation/perplexity": lambda v: f"perplexity {v:.2f}",
        "train/lr": lambda v: f"lr {v:.2e}",
        "train/grad_norm": lambda v: f"norm {v:.3f}",
        "perf/tokens_per_s": lambda v: f"{count(v)} tok/s",
        "perf/tokens_per_s_per_gpu": lambda v: f"{count(v)} tok/s/GPU",
        "perf/mfu": lambda v: f"MFU {v:.1%}",
        "perf/memory_gib": lambda v: f"{v:.2f} GiB",
        "perf/data_share": lambda v: f"data {v:.1%}",
        "checkpoint/write_s": lambda v: f"checkpoint written in {v:.2f} s",
        "checkpoint/stall_s": lambda v: f"training waited {v:.3f} s for it",
    }
    quiet = {"perf/step_s", "perf/mfu_full"}  # follow from the others; in the files all the same
    first = [show(metrics[key]) for key, show in known.items() if key in metrics]
    rest = [f"{k} {v:.4g}" for k, v in metrics.items() if k not in known and k not in quiet]
    return first + rest


def duration(seconds: float) -> str:
    """3725 -> '1h02m'; 62 -> '1m02s'."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
