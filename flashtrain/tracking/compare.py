"""Several runs side by side: what differs between their configs, how they ended, their curves.

Everything is read from the run folders, so runs that still train can be compared as well.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtrain.config import ConfigError
from flashtrain.tracking.charts import Curve, after_the_start, line_chart

# what names or places a run rather than changing it
SILENT = ("name", "run_dir", "tracking", "data.path")
LOSS, VALIDATION = "train/loss", "validation/loss"


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it."""

    folder: Path
    name: str
    config: dict[str, Any]  # by dotted key: {"optimizer.lr": 0.001, ..}
    rows: list[dict[str, Any]]  # of metrics.jsonl

    @property
    def step(self) -> int:
        """Last optimizer step that was logged; 0 before that."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def steps(self) -> int:
        return int(self.config["trainer.steps"])

    def values(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has a finite one."""
        return [(int(row["step"]), float(row[key])) for row in self.rows if is_finite(row.get(key))]

    def last(self, key: str) -> float | None:
        values = self.values(key)
        return values[-1][1] if values else None

    def median(self, key: str) -> float | None:
        values = [value for _, value in self.values(key)]
        return statistics.median(values) if values else None


def read_record(folder: Path) -> Record:
    """Raises ConfigError for a folder that holds no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.json: name run folders, as runs/NAME")
    config = json.loads(path.read_text())
    flat = flatten(config)
    return Record(folder, str(config.get("name", folder.name)), flat, read_rows(folder))


def read_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Whole rows of one of a run's records; a line that is being written is left out, and so is
    what a full disk once cut (files.py)."""
    path = folder / name
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith(b"\n"):
                rows.append(json.loads(line))
    return rows


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(records: Sequence[Record]) -> list[str]:
    """Dotted keys in which the configs are not all equal, in the order of the config."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    return [
        key
        for key in keys
        if not any(key == silent or key.startswith(silent + ".") for silent in SILENT)
        and len({json.dumps(record.config.get(key)) for record in records}) > 1
    ]


def best_first(records: Sequence[Record]) -> list[Record]:
    """By validation loss, else by training loss; runs without either last."""

    def rank(record: Record) -> float:
        loss = record.last(VALIDATION)
        loss = record.last(LOSS) if loss is None else loss
        return math.inf if loss is None else loss

    return sorted(records, key=rank)


def comparison(records: Sequence[Record]) -> list[list[str]]:
    """A table with a header: one row per run, a column for every key that differs.

    Losses are the last logged ones; speed, MFU and memory medians over the logged steps.
    """
    differing = differences(records)
    columns: dict[str, list[str]] = {"run": _names(records)}
    columns |= {
        name: [_said(record.config.get(key)) for record in records]
        for key, name in zip(differing, _short(differing), strict=True)
    }
    columns["steps"] = [
        str(r.step) if r.step >= r.steps else f"{r.step} of {r.steps}" for r in records
    ]
    for title, value in (
        ("loss", [_number(r.last(LOSS), "{:.4f}") for r in records]),
        ("validation", [_number(r.last(VALIDATION), "{:.4f}") for r in records]),
        ("tokens/s", [_number(r.median("perf/tokens_per_s"), "{:,.0f}") for r in records]),
        ("MFU", [_number(r.median("perf/mfu"), "{:.1%}") for r in records]),
        ("GiB", [_number(r.last("perf/memory_gib"), "{:.2f}") for r in records]),
    ):
        if any(value):
            columns[title] = value
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def as_text(table: list[list[str]], markdown: bool = False) -> str:
    """The table as aligned columns, or in Markdown."""
    if markdown:
        table = [table[0], ["---"] * len(table[0]), *table[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in table)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    numbers = {"steps", "loss", "validation", "tokens/s", "MFU", "GiB"}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if title in numbers else cell.ljust(width)
            for cell, width, title in zip(row, widths, table[0], strict=True)
        ).rstrip()
        for row in table
    )


def overlaid(records: Sequence[Record], metric: str | None = None) -> str:
    """One SVG of all runs: the named metric, or training loss with validation loss over it.

    Raises ConfigError where no run has logged it twice.
    """
    curves: list[Curve] = []
    for color, (record, name) in enumerate(zip(records, _names(records), strict=True)):
        if metric is not None:
            curves.append(Curve(record.values(metric), name, color))
            continue
        validation = record.values(VALIDATION)
        several = len(validation) > 1
        label = None if several else name
        curves.append(Curve(record.values(LOSS), label, color, pale=several))
        if several:
            curves.append(Curve(validation, name, color, dots=True))
    y = metric or "training loss (pale), validation loss (dots)"
    if metric is None and not any(curve.dots for curve in curves):
        y = "training loss"
    chart = line_chart(curves, x="step", y=y, top=None if metric else after_the_start(curves))
    if not chart:
        seen = sorted({key for record in records for row in record.rows for key in row})
        raise ConfigError(
            f"no run has logged {metric or LOSS} twice; logged are {', '.join(seen) or 'no rows'}"
        )
    return chart


def _names(records: Sequence[Record]) -> list[str]:
    """Names of the runs; folders where names repeat."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else record.folder.name
        for name, record in zip(names, records, strict=True)
    ]


def _short(keys: Sequence[str]) -> list[str]:
    """The last word of each dotted key, or all of it where that is not unique."""
    words = [key.rpartition(".")[2] for key in keys]
    taken = {field for field in ("run", "steps", "loss") if field in words}
    return [
        word if words.count(word) == 1 and word not in taken else key
        for key, word in zip(keys, words, strict=True)
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_said(item) for item in value)}]"
    return "null" if value is None else str(value)
