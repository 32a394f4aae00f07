"""One HTML page about a run that opens anywhere, without a network: curves, samples, config.

Everything on it is read from the run folder, so it can be made while the run goes on, or after.
"""

import html
import json
from pathlib import Path
from typing import Any

from flashtrain.compose import from_dict
from flashtrain.config import ConfigError
from flashtrain.launch import ENDED
from flashtrain.tracking.card import card
from flashtrain.tracking.charts import HALF, Curve, after_the_start, line_chart
from flashtrain.tracking.compare import LOSS, VALIDATION, Record, read_record, read_rows

# title -> the metrics on one pair of axes
CHARTS = {
    "learning rate": ("train/lr",),
    "gradient norm": ("train/grad_norm",),
    "tokens per second": ("perf/tokens_per_s",),
    "model FLOPs utilization": ("perf/mfu", "perf/mfu_full"),
    "memory, GiB": ("perf/memory_gib",),
    "share of time spent waiting for data": ("perf/data_share",),
}
SAMPLES = 5  # the newest
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:960px;margin:2rem auto;
padding:0 1rem}h1{margin-bottom:.6rem}h2{margin:2.2rem 0 .4rem;font-size:1.1rem}
h3{margin:0;font-size:.9rem;font-weight:500;color:#4b5563}
pre{background:#f3f4f6;padding:1rem;overflow:auto;white-space:pre-wrap;font-size:13px;margin:0}
pre.wide{white-space:pre;font-size:11px}svg{width:100%;height:auto;display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:1.4rem 1.2rem;
align-items:start;margin-top:1rem}
table{border-collapse:collapse}td,th{padding:.15rem 1rem .15rem 0;text-align:left;
vertical-align:top}td{overflow-wrap:anywhere}th{font-weight:500;color:#6b7280;white-space:nowrap}
summary{cursor:pointer;margin-top:1.2rem}"""


def write_report(folder: Path) -> Path:
    """`<folder>/report.html`. Raises FileNotFoundError for a folder that holds no run."""
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{folder} holds no metrics.jsonl: name the run folder that train.sh printed"
        )
    record = read_record(folder)
    title = html.escape(record.name)
    parts = [
        f"<h1>{title}</h1><div class=pair>{_summary(record)}{_setup(folder)}</div>",
        _loss(record),
        f"<div class=pair>{''.join(_charts(record))}</div>",
        _evaluations(folder),
        *_samples(folder),
        *_files(folder),
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>{title}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def _loss(record: Record) -> str:
    curves = [
        Curve(record.values(LOSS), "training", 0),
        Curve(record.values(VALIDATION), "validation", 1, dots=True),
    ]
    curves = [curve for curve in curves if curve.points]
    chart = line_chart(curves, x="step", y="loss", top=after_the_start(curves))
    return f"<h2>loss</h2>{chart}" if chart else ""


def _charts(record: Record) -> list[str]:
    """The other metrics, each under its title; benchmarks by what they measure."""
    groups = {
        title: {key.rpartition("/")[2]: key for key in keys} for title, keys in CHARTS.items()
    }
    for key in dict.fromkeys(key for row in record.rows for key in row):
        if key.startswith("benchmark/"):
            name, _, metric = key.removeprefix("benchmark/").rpartition("/")
            groups.setdefault(metric.replace("_", " "), {})[name] = key
    parts = []
    for title, keys in groups.items():
        curves = [
            Curve(record.values(key), name, color, dots=key.startswith("benchmark/"))
            for color, (name, key) in enumerate(keys.items())
        ]
        if chart := line_chart(curves, x="step", y="", size=HALF):
            names = f" ({', '.join(keys)})" if len(keys) == 1 and curves[0].dots else ""
            parts.append(f"<div><h3>{html.escape(title + names)}</h3>{chart}</div>")
    return parts


def _setup(folder: Path) -> str:
    """What the start card said; nothing where a later version has other keys."""
    environment = folder / "environment.json"
    try:
        config = from_dict(json.loads((folder / "config.json").read_text()))
        processes = json.loads(environment.read_text())["processes"]
        return _table(dict(card(config, processes)))
    except (ConfigError, FileNotFoundError, KeyError):
        return ""


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
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {format(value, ',' if isinstance(value, int) else '.5g')}"
            for key, value in row.items()
        )
        lines.append(
            f"<tr><td>step {step}<td>{html.escape(str(what))}<td>{html.escape(numbers)}</tr>"
        )
    return f"<h2>evaluations</h2><table>{''.join(lines)}</table>"


def _samples(folder: Path) -> list[str]:
    """The newest one, the others to be unfolded."""
    parts: list[str] = []
    for row in reversed(read_rows(folder, "samples.jsonl")[-SAMPLES:]):
        title = f"{html.escape(str(row.get('name')))} at step {row.get('step')}"
        text = f"<pre>{html.escape(str(row.get('text', '')))}</pre>"
        first = f"<h2>{title}</h2>{text}"
        folded = f"<details><summary>{title}</summary>{text}</details>"
        parts.append(folded if parts else first)
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
