"""Line charts as SVG text, for pages and pictures that open without a network or a package."""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 960, 380
HALF = (470, 250)  # two beside each other
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 18, 44
LETTER = 7.0  # pixels, wide enough for most
# blue, orange, green, red, violet, cyan, pink, brown, grey, olive
COLORS = (
    *("#2563eb", "#ea7317", "#15803d", "#dc2626", "#7c3aed"),
    *("#0891b2", "#db2777", "#92400e", "#6b7280", "#65a30d"),
)
DASHES = ("", "7 4", "2 3")  # told apart by dashes where the colours begin again


@dataclass(frozen=True)
class Curve:
    """One line. Curves of one colour belong together; only named ones stand in the legend."""

    points: Sequence[tuple[float, float]]  # finite
    name: str | None
    color: int  # counts up; `COLORS` begin again
    pale: bool = False  # behind the others
    dots: bool = False


def line_chart(
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    top: float | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
    """A standalone <svg> of `size` pixels, higher where the legend is; "" where no curve has two
    points.

    x, y: what the axes say; y may be "". log_x, log_y: logarithmic; points at 0 and below are left
    out. top: lines leave the picture above this value.
    """
    kept = [
        (curve, [p for p in curve.points if (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)])
        for curve in curves
    ]
    points = [point for _, own in kept for point in own]
    if max((len(own) for _, own in kept), default=0) < 2:
        return ""
    named = [curve for curve in curves if curve.name]
    legend = 0.0
    if len(named) > 1:
        legend = 40 + LETTER * min(60, max(len(curve.name or "") for curve in named))
    width, height = size
    right = width - RIGHT - legend
    height = max(height, TOP + BOTTOM + 18 * len(named))
    across = _axis([p[0] for p in points], LEFT, right, log_x, own=log_x)
    heights = [p[1] if top is None else min(p[1], top) for p in points]
    up = _axis(heights, height - BOTTOM, TOP, log_y, pad=0.04)
    drawn = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for value, at in up.ticks:
        drawn.append(
            f'<line x1="{LEFT}" x2="{right:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e7eb"/>'
            f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_label(value)}</text>'
        )
    for value, at in across.ticks:
        drawn.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{height - BOTTOM}" y2="{height - BOTTOM + 5}" '
            f'stroke="#9ca3af"/><text x="{at:.1f}" y="{height - BOTTOM + 18}" '
            f'text-anchor="middle">{_label(value)}</text>'
        )
    middle = (TOP + height - BOTTOM) / 2
    drawn.append(
        f'<text x="{(LEFT + right) / 2:.0f}" y="{height - 8}" text-anchor="middle">'
        f'{html.escape(x)}</text><text x="14" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:.0f})">{html.escape(y)}</text>'
    )
    drawn.append(  # dots may stand on its edges
        f'<svg x="{LEFT - 4}" y="{TOP - 4}" width="{right - LEFT + 8:.0f}" '
        f'height="{height - BOTTOM - TOP + 8}" '
        f'viewBox="{LEFT - 4} {TOP - 4} {right - LEFT + 8:.0f} {height - BOTTOM - TOP + 8}">'
    )
    for curve, own in sorted(kept, key=lambda pair: not pair[0].pale):
        drawn.append(_line(curve, [(across.place(a), up.place(b)) for a, b in own]))
    drawn.append("</svg>")
    for index, curve in enumerate(named if legend else ()):
        at = TOP + 8 + 18 * index
        name = curve.name or ""
        shown = name if len(name) <= 60 else name[:59] + "…"
        drawn.append(
            f'<line x1="{right + 12:.0f}" x2="{right + 32:.0f}" y1="{at}" y2="{at}" '
            f'{_stroke(curve)}/><text x="{right + 38:.0f}" y="{at + 4}">{html.escape(shown)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui,sans-serif" font-size="12" fill="#374151">'
        f"{''.join(drawn)}</svg>"
    )


def stacked(charts: Sequence[tuple[str, str]]) -> str:
    """One <svg> of several, each below its title."""
    drawn, below = [], 0
    for title, chart in charts:
        height = int(re.search(r' height="(\d+)"', chart)[1])  # type: ignore[index]
        drawn.append(
            f'<text x="{LEFT}" y="{below + 22}" font-size="15">{html.escape(title)}</text>'
            f'<g transform="translate(0 {below + 30})">{chart}</g>'
        )
        below += height + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {below}" width="{WIDTH}" '
        f'height="{below}" font-family="system-ui,sans-serif" fill="#374151">'
        f'<rect width="{WIDTH}" height="{below}" fill="#fff"/>{"".join(drawn)}</svg>'
    )


def _label(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _stroke(curve: Curve) -> str:
    dash = DASHES[curve.color // len(COLORS) % len(DASHES)]
    return (
        f'stroke="{COLORS[curve.color % len(COLORS)]}" stroke-width="{1 if curve.pale else 2}" '
        f'stroke-opacity="{0.35 if curve.pale else 1}" stroke-linejoin="round"'
        + (f' stroke-dasharray="{dash}"' if dash else "")
    )


def _line(curve: Curve, places: list[tuple[float, float]]) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    line = f'<polyline points="{path}" fill="none" {_stroke(curve)}/>'
    if curve.dots:
        color = COLORS[curve.color % len(COLORS)]
        line += "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in places
        )
    return line


@dataclass(frozen=True)
class _Axis:
    place: Callable[[float], float]  # a value's pixel
    ticks: list[tuple[float, float]]  # value, pixel


def _axis(
    values: list[float], start: float, end: float, log: bool, pad: float = 0.0, own: bool = False
) -> _Axis:
    """The values spread from pixel `start` to `end`, with `pad` of the range free on both sides.

    own: ticks at the values themselves where they are few, as widths and lengths are.
    """
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    room = (high - low) * pad or (0.0 if high > low else abs(high) * 0.05 or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        at = math.log10(value) if log else value
        return start + (at - low) / (high - low) * (end - start)

    ticks = sorted(set(values))
    if not own or len(ticks) > 8:
        ticks = _log_ticks(10**low, 10**high) if log else _ticks(low, high)
    return _Axis(place, [(tick, place(tick)) for tick in ticks])


def _ticks(low: float, high: float) -> list[float]:
    """Three to nine round numbers within the range."""
    raw = (high - low) / 8
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range, or 1, 2 and 5 of each where there are few."""
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    parts = (1,) if sum(low <= power <= high for power in powers) > 3 else (1, 2, 5)
    return [p * part for p in powers for part in parts if low <= p * part <= high]


def after_the_start(curves: Sequence[Curve]) -> float | None:
    """A `top` for losses: the highest value after the first tenth, which falls from far above."""
    last = max((x for curve in curves for x, _ in curve.points), default=0.0)
    return max((y for curve in curves for x, y in curve.points if x >= last / 10), default=None)
