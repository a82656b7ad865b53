"""A line for each minute, the verdict at the end, and the plot of both."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness.summary import table
from bench.harness.svg_chart import Panel, line_panels
from bench.load.soak.ledger import Ledger, growth, median
from bench.load.soak.process import State, between

MIB = 2**20
MEMORY_GROWTH, LATENCY_GROWTH = 0.02, 0.05  # what is allowed
FILES = 4  # open connections of customers: a few more or fewer at any moment
TIMED = "plain"  # the kind that the verdict compares: equal orders all along


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the beginning."""

    begin: float
    end: float


def minute(states: Sequence[State], ledger: Ledger, span: Span) -> dict[str, Any]:
    """One line of the file: what was held and how long answers took within the span."""
    seen = between(states, span.begin, span.end)
    return {
        "minute": round(span.end / 60, 2),
        "memory_mib": _range([one.memory_bytes / MIB for one in seen]),
        "files": _range([one.files for one in seen]),
        "threads": _range([one.threads for one in seen]),
        "cpu_share": round((seen[-1].cpu_s - seen[0].cpu_s) / max(seen[-1].at - seen[0].at, 1e-9), 4),
        "load_average": round(os.getloadavg()[0], 2),  # of the machine: what else made answers late
        "latency_ms": ledger.spreads(span.begin, span.end),
    }


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(values), 2), "median": round(median(values), 2), "max": round(max(values), 2)}


def verdict(states: Sequence[State], ledger: Ledger, first: Span, last: Span) -> dict[str, Any]:
    """The first span after the warm-up against the last one. `broken` says in words what does not hold."""
    before, after = (between(states, span.begin, span.end) for span in (first, last))
    memory = growth(median(one.memory_bytes for one in before), median(one.memory_bytes for one in after))
    files = min(one.files for one in after) - min(one.files for one in before)
    threads = min(one.threads for one in after) - min(one.threads for one in before)
    times = [ledger.spreads(span.begin, span.end) for span in (first, last)]
    timed = [spreads.get(TIMED) for spreads in times]
    slower = growth(timed[0]["p50"], timed[1]["p50"]) if timed[0] and timed[1] else None
    broken = []
    if ledger.lost:
        broken.append(f"{sum(ledger.lost.values())} lost or wrong: {dict(ledger.lost)}")
    if memory >= MEMORY_GROWTH:
        broken.append(f"memory grew by {memory:.2%}, must be under {MEMORY_GROWTH:.0%}")
    if files > FILES:
        broken.append(f"{files} more files are open than at the beginning")
    if threads > 0:
        broken.append(f"{threads} more threads run than at the beginning")
    if slower is None:
        broken.append(f"no order of the kind {TIMED} was answered in the first or in the last span")
    elif slower > LATENCY_GROWTH:
        broken.append(f"the median latency grew by {slower:.2%}, at most {LATENCY_GROWTH:.0%} is allowed")
    return {
        "first_minutes": [round(first.begin / 60, 2), round(first.end / 60, 2)],
        "last_minutes": [round(last.begin / 60, 2), round(last.end / 60, 2)],
        "answers": sum(ledger.seen.values()),
        "seen": dict(sorted(ledger.seen.items())),
        "lost": dict(ledger.lost),
        "growth": {
            "memory": round(memory, 5),
            "files": files,
            "threads": threads,
            "latency_p50": None if slower is None else round(slower, 5),
        },
        "latency_ms": {"first": times[0], "last": times[1]},
        "broken": broken,
    }


def show(found: Mapping[str, Any]) -> str:
    """The table for people."""
    times = found["latency_ms"]
    rows = []
    for kind, last in times["last"].items():
        first = times["first"].get(kind) or dict.fromkeys(("count", "p50", "p99"))
        rows.append([kind, first["count"], first["p50"], first["p99"], last["count"], last["p50"], last["p99"]])
    head = ("latency, ms", "first count", "p50", "p99", "last count", "p50", "p99")
    facts = [[name, value] for name, value in found["growth"].items()]
    facts += [["answers", found["answers"]], ["lost or wrong", sum(found["lost"].values())]]
    said = found["broken"] or ["every bound holds"]
    return "\n".join([table(head, rows), "", table(("growth, first to last", "value"), facts), "", *said])


def plot(minutes: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document of all lines so far."""

    def line(name: str, part: str) -> list[tuple[float, float]]:
        return [(row["minute"], row[name][part]) for row in minutes]

    def latency(kind: str, part: str) -> list[tuple[float, float]]:
        rows = [(row["minute"], row["latency_ms"].get(kind)) for row in minutes]
        return [(at, times[part]) for at, times in rows if times]

    panels = [
        Panel("memory, MiB", {"median": line("memory_mib", "median"), "most": line("memory_mib", "max")}),
        Panel("open files", {"fewest": line("files", "min"), "most": line("files", "max")}),
        Panel("threads", {"most": line("threads", "max")}),
        Panel("load average of the machine", {"1 min": [(row["minute"], row["load_average"]) for row in minutes]}),
        Panel("latency of plain orders, ms", {"p50": latency(TIMED, "p50"), "p95": latency(TIMED, "p95")}),
        Panel("latency of live pictures, ms", {"p50": latency("live", "p50"), "p95": latency("live", "p95")}),
    ]
    return line_panels("A soak: one point for each minute", "minutes", panels)
