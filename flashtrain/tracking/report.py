"""One HTML page about a run that opens anywhere, without a network: curves, samples, config.

Everything on it is read from the run folder, so it can be made while the run goes on, or after.
"""

import html
import json
from pathlib import Path
from typing import Any

from flashtrain.launch import ENDED
from flashtrain.tracking.charts import Curve, line_chart
from flashtrain.tracking.compare import Record, read_record, read_rows

# title -> the metrics on one pair of axes
CHARTS = {
    "loss": ("train/loss", "validation/loss"),
    "learning rate": ("train/lr",),
    "gradient norm": ("train/grad_norm",),
    "tokens per second": ("perf/tokens_per_s",),
    "model FLOPs utilization": ("perf/mfu", "perf/mfu_full"),
    "memory, GiB": ("perf/memory_gib",),
    "share of time spent waiting for data": ("perf/data_share",),
}
SAMPLES = 5  # the newest
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:960px;margin:2rem auto;
padding:0 1rem}h1{margin-bottom:.2rem}h2{margin-top:2.2rem;font-size:1.1rem}
pre{background:#f3f4f6;padding:1rem;overflow:auto;white-space:pre-wrap}
pre.wide{white-space:pre;font-size:11px}svg{width:100%;height:auto}
table{border-collapse:collapse}td,th{padding:.15rem 1rem .15rem 0;text-align:left;
vertical-align:top}th{font-weight:500;color:#6b7280}summary{cursor:pointer;margin-top:1.5rem}"""


def write_report(folder: Path) -> Path:
    """`<folder>/report.html`. Raises FileNotFoundError for a folder that holds no run."""
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{folder} holds no metrics.jsonl: name the run folder that train.sh printed"
        )
    record = read_record(folder)
    title = html.escape(record.name)
    parts = [f"<h1>{title}</h1>", _summary(record)]
    for name, keys in CHARTS.items():
        curves = [
            Curve(record.values(key), key, color, dots=key.startswith("validation/"))
            for color, key in enumerate(keys)
        ]
        if chart := line_chart(curves, x="step", y=name):
            parts.append(f"<h2>{name}</h2>{chart}")
    parts += [_evaluations(folder), *_samples(folder), *_files(folder)]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def _summary(record: Record) -> str:
    """How far it is and how it stands."""
    ended = record.folder / ENDED
    why = json.loads(ended.read_text())["why"] if ended.is_file() else "trains, or was killed"
    rows: dict[str, object] = {
        "step": f"{record.step:,} of {record.steps:,} ({why})",
        "run folder": record.folder,
    }
    for key, name, form in (
        ("train/loss", "loss", "{:.4f}"),
        ("validation/loss", "validation loss", "{:.4f}"),
        ("validation/perplexity", "validation perplexity", "{:.2f}"),
    ):
        if (value := record.last(key)) is not None:
            rows[name] = form.format(value)
    for key, name, form in (
        ("perf/tokens_per_s", "tokens/s, median", "{:,.0f}"),
        ("perf/mfu", "MFU, median", "{:.1%}"),
    ):
        if (value := record.median(key)) is not None:
            rows[name] = form.format(value)
    if skipped := record.last("train/skipped_steps"):
        rows["skipped steps"] = f"{skipped:.0f}"
    return _table(rows)


def _evaluations(folder: Path) -> str:
    """What scripts/evaluate.py has measured."""
    rows = read_rows(folder, "evaluations.jsonl")
    if not rows:
        return ""
    lines = []
    for row in rows:
        step, what = row.pop("step"), row.pop("text", None) or row.pop("task", "")
        row.pop("time", None)
        numbers = ", ".join(f"{key} {value:.5g}" for key, value in row.items())
        lines.append(
            f"<tr><td>step {step}<td>{html.escape(str(what))}<td>{html.escape(numbers)}</tr>"
        )
    return f"<h2>evaluations</h2><table>{''.join(lines)}</table>"


def _samples(folder: Path) -> list[str]:
    parts = []
    for row in read_rows(folder, "samples.jsonl")[-SAMPLES:]:
        text = html.escape(str(row.get("text", "")))
        parts.append(f"<h2>sample at step {row.get('step')}</h2><pre>{text}</pre>")
    return parts


def _files(folder: Path) -> list[str]:
    """Environment, profile and configuration, as they lie in the folder."""
    parts = []
    environment = folder / "environment.json"
    if environment.is_file():
        parts.append(f"<h2>environment</h2>{_table(json.loads(environment.read_text()))}")
    for path in sorted((folder / "profile").glob("*.txt")):
        text = html.escape(path.read_text())
        parts.append(
            f"<details><summary>profile of {html.escape(path.stem)}; the trace lies beside it, "
            f"for https://ui.perfetto.dev</summary><pre class=wide>{text}</pre></details>"
        )
    text = html.escape((folder / "config.json").read_text())
    parts.append(f"<details><summary>configuration</summary><pre>{text}</pre></details>")
    return parts


def _table(rows: dict[str, Any]) -> str:
    lines = [
        f"<tr><th>{html.escape(key)}<td>{html.escape(str(value))}</tr>"
        for key, value in rows.items()
        if value is not None
    ]
    return f"<table>{''.join(lines)}</table>"
