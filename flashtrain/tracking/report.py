"""One HTML page about a run that opens anywhere, without a network: curves, samples, config.

Everything on it is read from the run folder, so it can be made while the run goes on, or after.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 760, 260, 56
COLORS = ("#2563eb", "#dc2626")
# title -> the metrics on one pair of axes
CHARTS = {
    "loss": ("train/loss", "validation/loss"),
    "learning rate": ("train/lr",),
    "gradient norm": ("train/grad_norm",),
    "tokens per second": ("perf/tokens_per_s",),
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:800px;margin:2rem auto;padding:0 1rem}
pre{background:#f6f8fa;padding:1rem;overflow:auto;white-space:pre-wrap}svg{width:100%}
text{font-size:12px;fill:#444}"""


def write_report(folder: Path) -> Path:
    """`<folder>/report.html`. Raises FileNotFoundError for a folder that holds no run."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(
            f"{folder} holds no metrics.jsonl: name the run folder that train.sh printed"
        )
    rows = _rows(metrics)
    parts = [f"<h1>{html.escape(folder.name)}</h1>"]
    parts += [_chart(title, names, rows) for title, names in CHARTS.items()]
    samples = _rows(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else []
    for row in samples[-3:]:
        text = html.escape(str(row.get("text", "")))
        parts.append(f"<h2>sample at step {row.get('step')}</h2><pre>{text}</pre>")
    config = folder / "config.json"
    if config.is_file():
        parts.append(f"<h2>configuration</h2><pre>{html.escape(config.read_text())}</pre>")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _chart(title: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """An SVG line chart over steps; nothing where no row has these metrics."""
    curves = {
        name: [(row["step"], row[name]) for row in rows if _finite(row.get(name))] for name in names
    }
    points = [point for curve in curves.values() for point in curve]
    if len(points) < 2:
        return ""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad

    def at(step: float, value: float) -> str:
        x = MARGIN + (step - left) / ((right - left) or 1) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - 32 - (value - low) / (high - low) * (HEIGHT - 56)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        x, y = at(left, value).split(",")
        drawn.append(
            f'<line x1="{x}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{MARGIN - 6}" y="{float(y) + 4:.0f}" text-anchor="end">{value:.4g}</text>'
        )
    for step in sorted({left, (left + right) // 2, right}):
        x = at(step, low).split(",")[0]
        drawn.append(f'<text x="{x}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        path = " ".join(at(*point) for point in curve)
        color = COLORS[index]
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        x = str(MARGIN + 150 * index)
        drawn.append(f'<text x="{x}" y="14" style="fill:{color}">{html.escape(name)}</text>')
    return f'<h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(drawn)}</svg>'


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
