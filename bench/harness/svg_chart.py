"""Stacked horizontal bars as SVG: text that a page can show and a diff can read, without a plotting library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme
WIDTH, LABEL, RIGHT, ROW, GAP, TOP = 900, 350, 90, 18, 8, 54


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts, by name, are drawn one after the other; the sum is written behind them."""

    label: str
    parts: Mapping[str, float]


def stacked_bars(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """An SVG document. All bars share one scale that begins at 0."""
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
