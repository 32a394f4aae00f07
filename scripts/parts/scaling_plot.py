"""Plots of speed over GPUs: what `plan.py --scaling` and `bench_scaling.py --plot` draw.

Needs matplotlib, which flashtrain itself does not: `pip install matplotlib`.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from flashtrain.planning.scaling import Curve

COLOURS = {  # what bounds a step -> marker's colour
    "products": "#2a7f3f",
    "hbm": "#7fb069",
    "recomputation": "#c9a227",
    "optimizer": "#8c8c8c",
    "tensor": "#c0392b",
    "context": "#8e44ad",
    "shard": "#2980b9",
    "replicate": "#16a085",
    "pipeline": "#d35400",
    "host": "#000000",
}


def pyplot() -> Any:
    """ValueError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_curves(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Tokens/s per GPU against GPUs, a panel for each kind of scaling; markers say what bounds."""
    plt = pyplot()
    kinds = sorted({curve.kind for curve in curves}, reverse=True)
    figure, panels = plt.subplots(1, len(kinds), figsize=(6.2 * len(kinds), 4.6), squeeze=False)
    seen: set[str] = set()
    for panel, kind in zip(panels[0], kinds, strict=True):
        for curve, dashes in zip(
            [c for c in curves if c.kind == kind], ("-", "--", ":", "-."), strict=False
        ):
            speeds = curve.per_gpu()
            share = [speed / max(speeds) for speed in speeds]
            gpus = [plan.gpus for plan in curve.plans]
            best = f"{curve.name} (1 = {max(speeds):,.0f} tokens/s per GPU)"
            panel.plot(gpus, share, dashes, color="#444444", linewidth=1, label=best, zorder=1)
            bounds = [plan.step.bound for plan in curve.plans]
            panel.scatter(gpus, share, c=[COLOURS[b] for b in bounds], s=42, zorder=2)
            seen.update(bounds)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("GPUs")
        panel.set_ylim(0, 1.05)
        panel.set_title(f"{kind} scaling")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower left", fontsize=8)
    panels[0][0].set_ylabel("tokens/s per GPU, share of the best")
    shown = [bound for bound in COLOURS if bound in seen]
    figure.legend(
        [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[bound]) for bound in shown],
        [f"bound by {bound}" for bound in shown],
        loc="upper center", ncol=5, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0.94),
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Measured tokens/s per GPU of each row beside the predicted one, a panel for each config."""
    plt = pyplot()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["config"], []).append(row)
    heights = [len(group) + 1 for group in groups.values()]
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(8, 0.42 * sum(heights) + 1.2), squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for panel, (config, group) in zip(panels[:, 0], groups.items(), strict=True):
        for at, row in enumerate(group):
            panel.barh(at - 0.2, row["tokens/s/GPU"], 0.38, color="#2980b9")
            if row.get("predicted tokens/s/GPU"):
                panel.barh(at + 0.2, row["predicted tokens/s/GPU"], 0.38, color="#b5cde0")
        names = [f"{row['gpus']} x  {row['layout']}" for row in group]
        panel.set_yticks(range(len(group)), names, fontsize=8)
        panel.invert_yaxis()
        panel.tick_params(axis="x", labelsize=8)
        panel.set_title("\n".join(wrap(config, 90)), fontsize=8, loc="right")
        panel.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("tokens/s per GPU: measured (dark), predicted (light)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
