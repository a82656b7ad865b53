"""Draws the dashboard from a Prometheus, for those who have no Grafana at hand: every panel, as one SVG.

    python deploy/grafana/picture.py --prometheus http://127.0.0.1:9090 --minutes 5 --out docs/dashboard.svg

The panels and their queries are those of deploy/grafana/dashboard.py. Knows Prometheus' HTTP API and SVG.
"""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import dashboard  # beside this file

COLUMN, LINE = 60, 30  # pixels of a cell of Grafana's grid
COLORS = ("#1b6ac9", "#d9730d", "#2f8f4e", "#b8328f", "#7a52c7", "#a8842c", "#3a9ba3", "#c93b3b")
POINTS = 120  # along the time axis
RATE_S = 30  # Grafana's $__rate_interval


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name as the panel's legend has it, its labels, and (time, value) pairs."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


Fetch = Callable[[str, str], list[Series]]  # PromQL, legend


def prometheus(address: str, minutes: float) -> Fetch:
    """Asks a Prometheus for the last minutes."""
    end = time.time()
    span = {"start": end - 60 * minutes, "end": end, "step": 60 * minutes / POINTS}

    def fetch(query: str, legend: str) -> list[Series]:
        text = query.replace("$__rate_interval", f"{RATE_S}s").replace("$job", ".*").replace("$instance", ".*")
        parameters = urllib.parse.urlencode({"query": text, **span})
        with urllib.request.urlopen(f"{address}/api/v1/query_range?{parameters}", timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        made = []
        for one in found:
            points = [(moment, float(value)) for moment, value in one["values"] if math.isfinite(float(value))]
            made += [Series(titled(legend, one["metric"]), one["metric"], points)] if points else []
        return made

    return fetch


def titled(legend: str, labels: dict[str, str]) -> str:
    """A legend with {{label}} replaced, as Grafana does."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend).strip()


def amount(value: float, unit: str) -> str:
    """A value with its unit, short."""
    if unit == "bytes":
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.3g}" + ("/s" if unit == "reqps" else "")


def words(x: float, y: float, said: str, size: int = 12, **more: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{attributes}>{escape(said)}</text>'


@dataclass(frozen=True, slots=True)
class Box:
    """The rectangle of a panel."""

    x: float
    y: float
    width: float
    height: float

    def place(self, share_x: float, share_y: float) -> tuple[float, float]:
        """From shares of width and height, the latter from below."""
        return self.x + share_x * self.width, self.y + (1 - share_y) * self.height


def stat(box: Box, series: Sequence[Series], unit: str) -> Iterator[str]:
    value = amount(series[0].last, unit) if series else "no data"
    yield words(box.x + box.width / 2, box.y + box.height / 2 + 12, value, 30, text_anchor="middle", fill=COLORS[2])


def timeseries(box: Box, series: Sequence[Series], unit: str, *, stacked: bool) -> Iterator[str]:
    moments = sorted({moment for one in series for moment, _ in one.points})
    base = dict.fromkeys(moments, 0.0)
    lines: list[tuple[Series, list[tuple[float, float]]]] = []
    for one in series:
        line = [(moment, value + (base[moment] if stacked else 0)) for moment, value in one.points]
        base.update(line if stacked else [])
        lines.append((one, line))
    top = max((value for _, line in lines for _, value in line), default=0) or 1
    yield words(box.x, box.y - 4, amount(top, unit), 10, fill="#777")
    yield f'<path d="M{box.x} {box.y}h{box.width}M{box.x} {box.y + box.height}h{box.width}" stroke="#ddd"/>'
    first, span = (moments[0], (moments[-1] - moments[0]) or 1) if moments else (0, 1)
    for number, (_, line) in enumerate(lines):
        places = (box.place((moment - first) / span, value / top) for moment, value in line)
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
        color = COLORS[number % len(COLORS)]
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    x, y = box.x, box.y + box.height + 16
    for number, (one, _) in enumerate(lines):
        if x + 7 * len(one.name) > box.x + box.width:
            x, y = box.x, y + 13
        yield words(x, y, one.name, 11, fill=COLORS[number % len(COLORS)])
        x += 7 * len(one.name) + 12


def heatmap(box: Box, series: Sequence[Series], unit: str) -> Iterator[str]:
    """Buckets from below, darker where more; Prometheus' buckets hold all smaller ones, Grafana's and these do not."""
    bounds = sorted(series, key=lambda one: float(one.labels["le"]))
    counts: list[dict[float, float]] = []
    for index, one in enumerate(bounds):
        below = dict(bounds[index - 1].points) if index else {}
        counts.append({moment: value - below.get(moment, 0) for moment, value in one.points})
    moments = sorted({moment for count in counts for moment in count})
    most = max((value for count in counts for value in count.values()), default=0) or 1
    width, height = box.width / max(len(moments), 1), box.height / max(len(bounds), 1)
    for row, count in enumerate(counts):
        for column, moment in enumerate(moments):
            if count.get(moment, 0) > most / 200:
                x, y = box.x + column * width, box.y + box.height - (row + 1) * height
                shade = 0.15 + 0.85 * count[moment] / most
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                    f'fill="{COLORS[1]}" fill-opacity="{shade:.2f}"/>'
                )
    for row in range(0, len(bounds), max(1, len(bounds) // 5)):
        bound = float(bounds[row].labels["le"])
        said = "more" if math.isinf(bound) else amount(bound, unit)
        yield words(box.x - 4, box.y + box.height - row * height, said, 9, text_anchor="end", fill="#777")


def table(box: Box, series: Sequence[Series]) -> Iterator[str]:
    for row, one in enumerate(series[:8]):
        shown = {name: value for name, value in one.labels.items() if not name.startswith("__") and name != "job"}
        line = "  ".join(f"{name} {value}" for name, value in shown.items())
        yield words(box.x, box.y + 14 * (row + 1), line, 11)


def draw(panel: dict[str, Any], fetch: Fetch) -> Iterator[str]:
    """One panel of deploy/grafana/dashboard.py, row headings among them."""
    place = panel["gridPos"]
    x, y, width, height = place["x"] * COLUMN, place["y"] * LINE, place["w"] * COLUMN, place["h"] * LINE
    if panel["type"] == "row":
        yield words(x + 6, y + 22, panel["title"], 18, font_weight="bold")
        return
    yield f'<rect x="{x + 4}" y="{y + 4}" width="{width - 8}" height="{height - 8}" fill="#fff" stroke="#ccc" rx="3"/>'
    yield words(x + 12, y + 22, panel["title"], 13, font_weight="bold")
    series = [one for target in panel["targets"] for one in fetch(target["expr"], target.get("legendFormat", ""))]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    box = Box(x + 56, y + 44, width - 76, height - 96)
    match panel["type"]:
        case "stat":
            yield from stat(Box(x, y, width, height), series, unit)
        case "heatmap":
            yield from heatmap(Box(box.x, box.y, box.width, height - 68), series, unit)
        case "table":
            yield from table(Box(x + 12, y + 28, width - 24, height - 40), series)
        case _:
            stacking = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"]
            yield from timeseries(box, series, unit, stacked=stacking == "normal")


def picture(fetch: Fetch) -> str:
    """The whole dashboard as SVG."""
    panels = dashboard.panels()
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * LINE
    size = f'width="{dashboard.WIDTH * COLUMN}" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">']
    parts.append(f'<rect {size} fill="#f4f5f5"/>')
    parts += [part for panel in panels for part in draw(panel, fetch)]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(picture(prometheus(given.prometheus, given.minutes)))


if __name__ == "__main__":
    main()
