"""Texts and tasks that a model is measured on: by a run at intervals, by scripts/evaluate.py."""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashtrain.config import BenchmarkConfig, ConfigError
from flashtrain.examinee import Examinee
from flashtrain.scoring import perplexity

Row = dict[str, Any]  # {"text" or "task": its name, a metric: its value, ..}; JSON types


def check_benchmark(config: BenchmarkConfig) -> None:
    """Raise ConfigError for texts that cannot be read and tasks that nobody knows."""
    for text in config.texts:
        read_text(Path(text))
    if not config.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks {','.join(config.tasks)} need the package lm-eval, which is not installed: "
            "pip install 'flashtrain[lm-eval]'"
        )
    from flashtrain.integrations.lm_eval import unknown_tasks  # takes seconds

    folder = None if config.task_folder is None else Path(config.task_folder)
    if unknown := unknown_tasks(config.tasks, folder):
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them; those of "
            "a folder of your own need task_folder"
        )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {path} cannot be read as UTF-8: {error}") from error


def on_texts(examinee: Examinee, texts: Iterable[str], stride: int | None = None) -> list[Row]:
    """One row a text; see `scoring.windows` for the stride, by default the model's length."""
    rows = []
    for text in texts:
        content = read_text(Path(text))
        found = perplexity(examinee, examinee.tokenizer, content, stride or examinee.max_length)
        rows.append(
            {
                "text": text, "tokens": found.tokens, "bytes": found.bytes, "loss": found.loss,
                "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte,
            }
        )  # fmt: skip
    return rows


def on_tasks(examinee: Examinee, config: BenchmarkConfig) -> list[Row]:
    """One row a task, with lm-eval's metrics."""
    if not config.tasks:
        return []
    from flashtrain.integrations.lm_eval import evaluate

    folder = None if config.task_folder is None else Path(config.task_folder)
    found = evaluate(examinee, config.tasks, shots=config.shots, limit=config.limit, folder=folder)
    return [
        # lm-eval's "acc,none": the metric after the filter of that name
        {"task": task}
        | {
            key.removesuffix(",none").replace(",", " "): value
            for key, value in metrics.items()
            if isinstance(value, int | float) and key != "sample_len"
        }
        for task, metrics in found.items()
    ]


def as_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """{"benchmark/novel.txt/perplexity": 30.1, ..}; texts of one name in two folders by their
    paths."""
    texts = {row["text"] for row in rows if "text" in row}
    names = [Path(text).name for text in texts]
    return {
        f"benchmark/{name}/{key}": value
        for row in rows
        for name in [row.get("task") or _told_apart(row["text"], names)]
        for key, value in row.items()
        if key not in ("text", "task", "tokens", "bytes", "loss") and math.isfinite(value)
    }


def _told_apart(text: str, names: Sequence[str]) -> str:
    name = Path(text).name
    return name if names.count(name) == 1 else text
