"""Draws stacked bars and lines as SVG text without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme
WIDTH, LABEL, RIGHT, ROW, GAP, TOP = 900, 350, 90, 18, 8, 54


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled bar of named parts, drawn one behind the other, and their sum."""

    label: str
    parts: Mapping[str, float]


def stacked_bars(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """Returns an SVG document of bars on one scale from 0."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    largest = max((sum(bar.parts.values()) for bar in bars), default=0.0) or 1.0
    scale = (WIDTH - LABEL - RIGHT) / largest
    height = TOP + len(bars) * (ROW + GAP) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for index, name in enumerate(names):
        left = LABEL + index * 110
        lines.append(f'<rect x="{left}" y="32" width="12" height="12" fill="{colours[name]}"/>')
        lines.append(f'<text x="{left + 17}" y="42">{escape(name)}</text>')
    for index, bar in enumerate(bars):
        y, x = TOP + index * (ROW + GAP), float(LABEL)
        lines.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(bar.label)}</text>')
        for name, value in bar.parts.items():
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="{ROW}" fill="{colours[name]}"/>'
            )
            x += value * scale
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{sum(bar.parts.values()):.3g} {escape(unit)}</text>')
    return "\n".join([*lines, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over a shared horizontal axis, by name: points of (x, y), x ascending."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False  # the horizontal axis; the vertical one always begins at 0


PANEL, MARGIN_LEFT, MARGIN_TOP, FOOT = 150, 70, 30, 40


def line_panels(title: str, axis: str, panels: Sequence[Panel]) -> str:
    """Returns an SVG document of panels, one below the other, each scaled from 0."""
    height = MARGIN_TOP + len(panels) * (PANEL + FOOT) + GAP
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        drawn += _panel(panel, axis, MARGIN_TOP + index * (PANEL + FOOT))
    return "\n".join([*drawn, "</svg>", ""])


def _panel(panel: Panel, axis: str, top: int) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    position = math.log10 if panel.logarithmic else float
    left, right = min((position(x) for x, _ in points), default=0.0), max((position(x) for x, _ in points), default=1.0)
    most = max((y for _, y in points), default=0.0) or 1.0
    across, floor = (WIDTH - MARGIN_LEFT - RIGHT) / ((right - left) or 1.0), top + PANEL
    ends = [f"{10**end if panel.logarithmic else end:.3g}" for end in (left, right)]
    drawn = [
        f'<text x="{MARGIN_LEFT}" y="{top + 14}">{escape(panel.title)}</text>',
        f'<path d="M{MARGIN_LEFT},{top + 20}V{floor}H{WIDTH - RIGHT}" fill="none" stroke="#999999"/>',
        f'<text x="{MARGIN_LEFT - 6}" y="{top + 28}" text-anchor="end">{most:.4g}</text>',
        f'<text x="{MARGIN_LEFT - 6}" y="{floor}" text-anchor="end">0</text>',
        f'<text x="{MARGIN_LEFT}" y="{floor + 16}">{ends[0]}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{floor + 16}" text-anchor="end">{ends[1]} {escape(axis)}</text>',
    ]
    for index, (name, line) in enumerate(panel.lines.items()):
        colour, room = COLOURS[index % len(COLOURS)], PANEL - 20
        positions = [(MARGIN_LEFT + (position(x) - left) * across, floor - y / most * room) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(f'<text x="{WIDTH - RIGHT + 6}" y="{top + 32 + 15 * index}" fill="{colour}">{escape(name)}</text>')
    return drawn


@dataclass(frozen=True, slots=True)
class Interval:
    """A bar from 0 to `low`, paler up to `high`; `ours` chooses the colour."""

    label: str
    low: float
    high: float
    ours: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that share a scale from 0, with a line of small print about the measurement."""

    title: str
    unit: str
    intervals: Sequence[Interval]
    source: str


def grouped_intervals(title: str, groups: Sequence[Group]) -> str:
    """Returns an SVG document: one group below the other, each with its own scale."""
    lines = [f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    y = TOP - 10
    for group in groups:
        largest = max((interval.high for interval in group.intervals), default=0.0) or 1.0
        scale = (WIDTH - LABEL - 2 * RIGHT) / largest
        lines.append(f'<text x="10" y="{y + 13}" font-weight="bold">{escape(group.title)}</text>')
        for interval in group.intervals:
            y += ROW + GAP
            colour = COLOURS[0] if interval.ours else COLOURS[1]
            low, high = interval.low * scale, interval.high * scale
            value = f"{interval.low:.3g}"
            if interval.high > interval.low:
                value += f" to {interval.high:.3g}"
            lines += [
                f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(interval.label)}</text>',
                f'<rect x="{LABEL}" y="{y}" width="{high:.1f}" height="{ROW}" fill="{colour}" fill-opacity="0.4"/>',
                f'<rect x="{LABEL}" y="{y}" width="{low:.1f}" height="{ROW}" fill="{colour}"/>',
                f'<text x="{LABEL + high + 6:.1f}" y="{y + 13}">{value} {escape(group.unit)}</text>',
            ]
        y += ROW + GAP
        lines.append(f'<text x="{LABEL}" y="{y + 9}" font-size="11" fill="#555555">{escape(group.source)}</text>')
        y += ROW + GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + GAP}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{y + GAP}" fill="white"/>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])
