"""Line charts as SVG text, for pages that need no other file: a few lines, drawn in milliseconds."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["COLORS", "Series", "line_chart"]

#: Okabe and Ito's, which color-blind readers tell apart; black is for what is compared with.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 260, 58, 12, 10, 40


class Series(NamedTuple):
    """A line: its points from left to right, and how it is drawn. One point is a line over the whole width."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dash: str = ""


def line_chart(series: Sequence[Series], x_label: str, y_label: str, may_be_log: bool = True) -> str:
    """An HTML figure with a legend; empty without a point.

    The vertical axis `may_be_log`: it is logarithmic where positive values span 1 : 20 or more.
    """
    points = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    # A single point says nothing of the horizontal axis.
    xs, values = [x for line in series if len(line.points) > 1 for x, _ in line.points], [y for _, y in points]
    left, right = (min(xs), max(xs)) if xs else (0.0, 1.0)
    low, high = min(values), max(values)
    log = may_be_log and low > 0 and high / low >= 20
    transform = math.log10 if log else float
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    bottom, top = (transform(edge) for edge in (min(low, ticks[0]), max(high, ticks[-1])))
    top = top if top > bottom else bottom + 1

    def at_x(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (transform(y) - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(left, right):
        if left <= tick <= right:
            parts.append(f'<text x="{at_x(tick):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for line in series:
        shown = [(x, y) for x, y in line.points if math.isfinite(y)]
        shown = [(left, shown[0][1]), (right, shown[0][1])] if len(shown) == 1 else shown
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in shown)
        title = f"<title>{escape(line.label)}</title>"
        parts.append(
            f'<polyline stroke="{line.color}" stroke-dasharray="{line.dash}" points="{path}">{title}</polyline>'
        )
    swatches = "".join(
        f'<span><svg width="22" height="8"><line x1="0" x2="22" y1="4" y2="4" stroke="{line.color}" stroke-width="2.5" '
        f'stroke-dasharray="{line.dash}"/></svg> {escape(line.label)}</span>'
        for line in series
    )
    note = ", logarithmic" if log else ""
    return (
        f'<figure><figcaption>{escape(y_label)}{note}</figcaption><div class="legend">{swatches}</div>'
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span the values."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(factor * size for factor in (1, 2, 5, 10) if span / (factor * size) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 3) if last - first <= 3 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]
