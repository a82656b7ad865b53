"""The definition of a fault and the row of its result."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.robustness.scenario import OK, Scenario

Outcomes = Counter[str]


@dataclass(frozen=True, slots=True)
class Fault:
    """Injects a fault `scenario.count` times; `run` returns the outcomes of the affected requests.

    `hit`: outcomes allowed for affected requests. `bystanders`: for the others. Clients repeat a request until they get
    an image; any other outcome is lost.
    """

    name: str
    count: int
    run: Callable[[Scenario], Awaitable[Outcomes]]
    hit: frozenset[str] = frozenset({OK})
    bystanders: frozenset[str] = frozenset({OK})
    server: str = "plain"  # plain, workers, safety, or clock, whose wall clock can be set
    background_clients: int = 4  # bystanders


@dataclass(frozen=True, slots=True)
class FaultResult:
    """`lost`: no response, a wrong or disallowed one, or an image that never came."""

    fault: str
    count: int
    hit: Mapping[str, int]
    bystanders: Mapping[str, int]
    lost: int
    lost_what: Mapping[str, int]
    recover_s: float | None  # the longest time from a fault to the next correct image


def fault_result(fault: Fault, scenario: Scenario, hit: Outcomes, bystanders: Outcomes) -> FaultResult:
    losses = Counter({f"hit: {label}": n for label, n in hit.items() if label not in fault.hit})
    losses += Counter({f"bystander: {label}": n for label, n in bystanders.items() if label not in fault.bystanders})
    if scenario.never_ok:
        losses["never got an image"] = scenario.never_ok
    return FaultResult(
        fault.name,
        scenario.count,
        dict(sorted(hit.items())),
        dict(sorted(bystanders.items())),
        sum(losses.values()),
        dict(losses),
        round(max(scenario.recovery_s), 3) if scenario.recovery_s else None,
    )
