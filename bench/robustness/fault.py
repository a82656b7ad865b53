"""What a fault of the campaign is, and the row of the table that it leaves."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.robustness.scenario import OK, Scenario

Outcomes = Counter[str]


@dataclass(frozen=True, slots=True)
class FaultScenario:
    """`play` makes it happen stage.count times and returns what those whom it hits saw.

    `hit` is what they may see, `bystanders` what everyone else may see meanwhile; all who want a picture ask again
    until they have it. Anything else counts as lost.
    """

    name: str
    count: int
    run: Callable[[Scenario], Awaitable[Outcomes]]
    hit: frozenset[str] = frozenset({OK})
    bystanders: frozenset[str] = frozenset({OK})
    server_kind: str = (
        "plain"  # which server it plays on: plain, workers, safety, or clock, whose wall clock can be set
    )
    background_clients: int = 4  # bystanders


@dataclass(frozen=True, slots=True)
class FaultResult:
    """`lost`: no answer, a wrong one, one that this fault does not excuse, or a picture that never came."""

    fault: str
    count: int
    hit: Mapping[str, int]
    bystanders: Mapping[str, int]
    lost: int
    lost_what: Mapping[str, int]
    recover_s: float | None  # the longest, from the fault to the next right picture


def fault_result(fault: FaultScenario, scenario: Scenario, hit: Outcomes, bystanders: Outcomes) -> FaultResult:
    losses = Counter({f"hit: {label}": n for label, n in hit.items() if label not in fault.hit})
    losses += Counter({f"bystander: {label}": n for label, n in bystanders.items() if label not in fault.bystanders})
    if scenario.never_ok:
        losses["never got a picture"] = scenario.never_ok
    return FaultResult(
        fault.name,
        scenario.count,
        dict(sorted(hit.items())),
        dict(sorted(bystanders.items())),
        sum(losses.values()),
        dict(losses),
        round(max(scenario.recovery_s), 3) if scenario.recovery_s else None,
    )
