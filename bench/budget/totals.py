"""Sums the events of a card into the JSON document and the tables of `python -m bench.budget`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.budget.engine import Counted
from bench.budget.events import Event, Launch, Mark, Replay, Transfer, Wait
from bench.budget.rates import (
    CARDS,
    FIXED_MS,
    HOST_MS,
    floor_ms,
    launch_ms,
    row_of,
    share,
    transfer_ms,
)
from bench.harness.summary import table

STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class _Placed:
    """A launch with its stage, and whether it is in a graph."""

    stage: str
    launch: Launch
    captured: bool


def _placed(events: Sequence[Event]) -> Iterator[_Placed]:
    marks = 0
    for event in events:
        marks += isinstance(event, Mark)
        stage = STAGES[min(max(marks, 1), len(STAGES)) - 1]
        if isinstance(event, Launch):
            yield _Placed(stage, event, captured=False)
        elif isinstance(event, Replay):
            yield from (_Placed(stage, launch, captured=True) for launch in event.launches)


def document(counted: Counted) -> dict[str, Any]:
    """Returns the counts of one batch.

    launches: within graphs. bytes and projected_ms: of all launches of a stage. `rest`: the host's part in launches
    outside graphs, and the copies.
    """
    placed, events = list(_placed(counted.events)), counted.events
    transfers = [event for event in events if isinstance(event, Transfer)]
    outside = sum(one.launch.kernels for one in placed if not one.captured)

    def of(stage: str) -> list[_Placed]:
        return [one for one in placed if one.stage == stage]

    projected = {}
    for name, card in CARDS.items():
        ms = {stage: sum(launch_ms(stage, one.launch, card) for one in of(stage)) for stage in STAGES}
        replays = sum(isinstance(event, Replay) for event in events)
        ms["rest"] = (outside + replays) * HOST_MS + sum(map(transfer_ms, transfers))
        projected[name] = {key: round(value, 3) for key, value in {**ms, "total": sum(ms.values())}.items()}
    return {
        "launches_outside_graphs": outside,
        "launches": {stage: sum(one.launch.kernels for one in of(stage) if one.captured) for stage in STAGES},
        "bytes": {stage: sum(_traffic(one.launch) for one in of(stage)) for stage in STAGES},
        "peak_bytes": counted.peak_bytes,
        "transfers": {
            "pageable": sum(not transfer.pinned for transfer in transfers),
            "pinned": sum(transfer.pinned for transfer in transfers),
        },
        "waits": sum(isinstance(event, Wait) for event in events),
        "projected_ms": projected,
    }


def _traffic(launch: Launch) -> int:
    return launch.call.read + launch.call.written


def show(counted: Counted, found: dict[str, Any], about: str) -> str:
    """Returns tables for people: kernels by stage with the arithmetic of their time, the rest, and the projection."""
    placed = list(_placed(counted.events))
    rows: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for one in placed:
        rows[one.stage, row_of(one.launch.call)].append(one.launch)
    kernels = [
        [
            stage,
            name,
            sum(launch.kernels for launch in launches),
            sum(launch.call.operations for launch in launches) / 1e9,
            sum(map(_traffic, launches)) / 1e6,
            *(sum(floor_ms(launch.call, card) for launch in launches) for card in CARDS.values()),
            f"{share(stage, launches[0].call):.0%}",
            *(sum(launch_ms(stage, launch, card) for launch in launches) for card in CARDS.values()),
        ]
        for (stage, name), launches in rows.items()
    ]
    head = ["stage", "kernel", "launches", "GFLOP", "MB", *(f"floor, {name}" for name in CARDS), "share"]
    outside = [
        [one.stage, one.launch.call.name, one.launch.kernels, _traffic(one.launch) / 1e6]
        for one in placed
        if not one.captured
    ]
    transfers = [event for event in counted.events if isinstance(event, Transfer)]
    copies = [[("pinned" if one.pinned else "pageable"), one.bytes / 1e6, transfer_ms(one)] for one in transfers]
    projected = [[name, *found["projected_ms"][name].values()] for name in CARDS]
    return "\n".join(
        [
            f"{about}: counted, not timed; milliseconds are projections",
            f"A kernel's time is {FIXED_MS} ms for each launch, and its floor over the share of the peak that it "
            "reached on an H100; `rest` is "
            f"{HOST_MS} ms for each launch from the host, graphs among them, and the copies.",
            "",
            table([*head, *(f"ms, {name}" for name in CARDS)], kernels),
            "",
            "Outside of graphs:",
            table(("stage", "call", "launches", "MB"), outside[:20]),
            *([f"and {len(outside) - 20} more"] if len(outside) > 20 else []),
            "",
            "Between host and card:",
            table(("memory", "MB", "ms"), copies),
            f"{found['waits']} waits of the host for the card",
            f"at most {counted.peak_bytes / 1e9:.2f} GB held by tensors",
            "",
            table(("card", *STAGES, "rest, ms", "total"), projected),
        ]
    )
