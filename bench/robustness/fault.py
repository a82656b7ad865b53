"""What a fault of the campaign is, and the row of the table that it leaves."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.robustness.scenario import RIGHT, Stage

Seen = Counter[str]


@dataclass(frozen=True, slots=True)
class Fault:
    """`play` makes it happen stage.count times and returns what those whom it hits saw.

    `hit` is what they may see, `bystanders` what everyone else may see meanwhile; all who want a picture ask again
    until they have it. Anything else counts as lost.
    """

    name: str
    count: int
    play: Callable[[Stage], Awaitable[Seen]]
    hit: frozenset[str] = frozenset({RIGHT})
    bystanders: frozenset[str] = frozenset({RIGHT})
    stage: str = "plain"  # which server it plays on: plain, workers, safety, or clock, whose wall clock can be set
    crowd: int = 4  # bystanders


@dataclass(frozen=True, slots=True)
class Row:
    """`lost`: no answer, a wrong one, one that this fault does not excuse, or a picture that never came."""

    fault: str
    count: int
    hit: Mapping[str, int]
    bystanders: Mapping[str, int]
    lost: int
    lost_what: Mapping[str, int]
    recover_s: float | None  # the longest, from the fault to the next right picture


def row(fault: Fault, stage: Stage, hit: Seen, bystanders: Seen) -> Row:
    excused = Counter({f"hit: {label}": n for label, n in hit.items() if label not in fault.hit})
    excused += Counter({f"bystander: {label}": n for label, n in bystanders.items() if label not in fault.bystanders})
    if stage.never:
        excused["never got a picture"] = stage.never
    return Row(
        fault.name,
        stage.count,
        dict(sorted(hit.items())),
        dict(sorted(bystanders.items())),
        sum(excused.values()),
        dict(excused),
        round(max(stage.recovered), 3) if stage.recovered else None,
    )
