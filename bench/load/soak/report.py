"""The line of a minute, the verdict, and the plot."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness.summary import table
from bench.harness.svg_chart import Panel, line_panels
from bench.load.soak.counters import Counters, growth, median
from bench.load.soak.process import ProcessState, in_span

MIB = 2**20
MEMORY_GROWTH, LATENCY_GROWTH = 0.02, 0.05  # allowed
OPEN_FILES_SLACK = 4  # connections of clients come and go
COMPARED_KIND = "plain"  # the kind that the verdict compares: equal requests throughout


@dataclass(frozen=True, slots=True)
class Span:
    """Begin and end in seconds from the start."""

    begin: float
    end: float


def minute(states: Sequence[ProcessState], counters: Counters, span: Span) -> dict[str, Any]:
    """Returns one line of the file: resources and latencies within the span."""
    window = in_span(states, span.begin, span.end)
    return {
        "minute": round(span.end / 60, 2),
        "memory_mib": _range([item.memory_bytes / MIB for item in window]),
        "files": _range([item.files for item in window]),
        "threads": _range([item.threads for item in window]),
        "cpu_share": round((window[-1].cpu_s - window[0].cpu_s) / max(window[-1].at - window[0].at, 1e-9), 4),
        "load_average": round(os.getloadavg()[0], 2),  # of the machine: other work makes responses slow
        "latency_ms": counters.latency_percentiles(span.begin, span.end),
    }


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(values), 2), "median": round(median(values), 2), "max": round(max(values), 2)}


def verdict(states: Sequence[ProcessState], counters: Counters, first_span: Span, last_span: Span) -> dict[str, Any]:
    """Compares the first span after the warm-up with the last one. `broken` names each bound that does not hold."""
    before, after = (in_span(states, span.begin, span.end) for span in (first_span, last_span))
    memory = growth(median(item.memory_bytes for item in before), median(item.memory_bytes for item in after))
    files = min(item.files for item in after) - min(item.files for item in before)
    threads = min(item.threads for item in after) - min(item.threads for item in before)
    by_span = [counters.latency_percentiles(span.begin, span.end) for span in (first_span, last_span)]
    compared = [latency_percentiles.get(COMPARED_KIND) for latency_percentiles in by_span]
    slower = growth(compared[0]["p50"], compared[1]["p50"]) if compared[0] and compared[1] else None
    broken = []
    if counters.lost:
        broken.append(f"{sum(counters.lost.values())} lost or wrong: {dict(counters.lost)}")
    if memory >= MEMORY_GROWTH:
        broken.append(f"memory grew by {memory:.2%}, must be under {MEMORY_GROWTH:.0%}")
    if files > OPEN_FILES_SLACK:
        broken.append(f"{files} more files are open than at the beginning")
    if threads > 0:
        broken.append(f"{threads} more threads run than at the beginning")
    if slower is None:
        broken.append(f"no request of the kind {COMPARED_KIND} was answered in the first or in the last span")
    elif slower > LATENCY_GROWTH:
        broken.append(f"the median latency grew by {slower:.2%}, at most {LATENCY_GROWTH:.0%} is allowed")
    return {
        "first_minutes": [round(first_span.begin / 60, 2), round(first_span.end / 60, 2)],
        "last_minutes": [round(last_span.begin / 60, 2), round(last_span.end / 60, 2)],
        "answers": sum(counters.seen.values()),
        "seen": dict(sorted(counters.seen.items())),
        "lost": dict(counters.lost),
        "growth": {
            "memory": round(memory, 5),
            "files": files,
            "threads": threads,
            "latency_p50": None if slower is None else round(slower, 5),
        },
        "latency_ms": {"first": by_span[0], "last": by_span[1]},
        "broken": broken,
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns the table for people."""
    by_span = result["latency_ms"]
    rows = []
    for kind, last_span in by_span["last"].items():
        first_span = by_span["first"].get(kind) or dict.fromkeys(("count", "p50", "p99"))
        rows.append(
            [
                kind,
                first_span["count"],
                first_span["p50"],
                first_span["p99"],
                last_span["count"],
                last_span["p50"],
                last_span["p99"],
            ]
        )
    head = ("latency, ms", "first count", "p50", "p99", "last count", "p50", "p99")
    facts = [[name, value] for name, value in result["growth"].items()]
    facts += [["answers", result["answers"]], ["lost or wrong", sum(result["lost"].values())]]
    findings = result["broken"] or ["every bound holds"]
    return "\n".join([table(head, rows), "", table(("growth, first to last", "value"), facts), "", *findings])


def plot(minutes: Sequence[Mapping[str, Any]]) -> str:
    """Returns an SVG document of all lines so far."""

    def line(name: str, part: str) -> list[tuple[float, float]]:
        return [(row["minute"], row[name][part]) for row in minutes]

    def latency(kind: str, part: str) -> list[tuple[float, float]]:
        rows = [(row["minute"], row["latency_ms"].get(kind)) for row in minutes]
        return [(at, by_span[part]) for at, by_span in rows if by_span]

    panels = [
        Panel("memory, MiB", {"median": line("memory_mib", "median"), "most": line("memory_mib", "max")}),
        Panel("open files", {"fewest": line("files", "min"), "most": line("files", "max")}),
        Panel("threads", {"most": line("threads", "max")}),
        Panel("load average of the machine", {"1 min": [(row["minute"], row["load_average"]) for row in minutes]}),
        Panel(
            "latency of plain requests, ms",
            {"p50": latency(COMPARED_KIND, "p50"), "p95": latency(COMPARED_KIND, "p95")},
        ),
        Panel("latency of live images, ms", {"p50": latency("live", "p50"), "p95": latency("live", "p95")}),
    ]
    return line_panels("A soak: one point for each minute", "minutes", panels)
