"""`metrics.jsonl` and `samples.jsonl` in the run folder: the record that needs no service.

One JSON object a line, only ever appended to, and on the disk's way as soon as it is written. After
a resume at step s the rows beyond s are trained again, so they are cut away: a curve has each step
once.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("flashtrain.tracking")


class Files:
    def __init__(self, folder: Path) -> None:
        self.metrics, self.samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        self.torn = False  # the last write may have left half a line
        self.warned = False

    def cut(self, step: int) -> None:
        """Drop rows of steps after `step`, and lines that a crash left half-written."""
        for path in (self.metrics, self.samples):
            try:
                if path.exists():
                    _cut(path, step)
            except OSError as error:
                log.warning(
                    "cannot cut %s (%s): its rows after step %d come twice",
                    path, error.strerror, step,
                )  # fmt: skip

    def start(self, config: dict[str, Any], resumed_id: str | None) -> None:
        self.metrics.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN; null leaves a gap in a plot, which is what it is
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._append(self.metrics, {"step": step, "time": round(time.time(), 3), **row})

    def text(self, step: int, name: str, text: str) -> None:
        row = {"step": step, "time": round(time.time(), 3), "name": name, "text": text}
        self._append(self.samples, row)

    def finish(self, status: str) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        if self.torn:
            line = b"\n" + line
        try:
            with path.open("ab", buffering=0) as file:
                self.torn = file.write(line) != len(line)
        except OSError as error:
            self.torn = True
            if not self.warned:
                log.warning("cannot write %s (%s): rows are lost meanwhile", path, error.strerror)
            self.warned = True


def _cut(path: Path, step: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_row(line, step)]
    if kept == lines:
        return
    if kept == lines[: len(kept)]:  # which a full disk allows
        os.truncate(path, sum(map(len, kept)))
        return
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _is_row(line: bytes, last: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= last
    except (ValueError, KeyError, TypeError):
        return False
