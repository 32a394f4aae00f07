"""Progress bars of a preparation, one a stage, for a terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from flashtrain.data.prepare import Progress

STAGES = {"tokenizer": "training the tokenizer", "tokens": "writing tokens"}


class Bars:
    """Called with each `Progress`; a context manager that draws meanwhile."""

    def __init__(self, console: Console) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),  # nothing where the size is unknown
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.latest = self.began = time.perf_counter()
        self.first = Progress("", 0, 0, 0, None)

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        if progress.stage not in self.tasks:
            self.began = self.latest  # a stage starts where the one before reported last
            self.first = progress
            self.tasks[progress.stage] = self.bars.add_task(
                STAGES[progress.stage], total=progress.all_bytes, rate=""
            )
        self.latest = now
        seconds = max(now - self.began, 1e-9)
        rate = f"{progress.documents:,} documents"
        if progress.documents > self.first.documents:
            rate += f"  {(progress.documents - self.first.documents) / seconds:,.0f}/s"
        if progress.tokens > self.first.tokens:
            rate += f"  {(progress.tokens - self.first.tokens) / seconds / 1e6:.2f} M tokens/s"
        self.bars.update(self.tasks[progress.stage], completed=progress.done_bytes, rate=rate)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()
