"""Seeded faults of a soak, one at a time at random moments: those of chaos and fuzz that leave the process alive.

bench.robustness.chaos has the faults that end the process. Here they would hide growth: a new process starts with fresh
memory.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from bench.harness.errors import BenchError
from bench.load.soak.counters import Counters
from bench.robustness import client_faults, engine_faults
from bench.robustness.fault import Fault, Outcomes, fault_result
from bench.robustness.fuzz import CASES, Case
from bench.robustness.process_faults import DEADLINE_EXCEEDED
from bench.robustness.restarting_server import RestartingServer
from bench.robustness.scenario import OK, REQUEST_TIMEOUT_S, Scenario

REFUSED = "429 queue_full"
HANDLED = "as it must be"
BURST = 96  # orders at once, more than the queue holds
ENDS_PROCESS = ("hang (exit code 70)", "engine lost (exit code 71)")


def _client(client: Callable[[Scenario], Awaitable[str]]) -> Callable[[Scenario], Awaitable[Outcomes]]:
    async def run(scenario: Scenario) -> Outcomes:
        try:
            return Counter([await asyncio.wait_for(client(scenario), REQUEST_TIMEOUT_S)])
        except TimeoutError:
            return Counter(["silence"])
        except (OSError, EOFError, BenchError):
            return Counter(["cut"])

    return run


def _fuzz_case(fuzz_case: Case) -> Callable[[Scenario], Awaitable[Outcomes]]:
    async def run(scenario: Scenario) -> Outcomes:
        try:
            label = await asyncio.wait_for(fuzz_case(scenario.server, scenario.rng), REQUEST_TIMEOUT_S)
        except (OSError, EOFError, BenchError, TimeoutError) as error:
            label = f"wrong: {type(error).__name__} {error}"
        return Counter([label if label.startswith("wrong") else HANDLED])

    return run


async def burst(scenario: Scenario) -> Outcomes:
    """Sends more requests at once than the queue holds."""
    return await scenario.request_all(scenario.new_job() for _ in range(BURST))


async def deadline_exceeded(scenario: Scenario) -> Outcomes:
    """Sends a request that cannot start in time, behind one of half a second."""
    slow = asyncio.create_task(scenario.ask(scenario.new_job("[[slow]]", 96)))
    urgent = await scenario.ask(scenario.new_job(), timeout_ms=1)
    return Counter([urgent, await slow])


DISCONNECTED = frozenset({"left"})
FAULTS = (
    *(fault for fault in engine_faults.FAULTS if fault.server == "plain" and fault.name not in ENDS_PROCESS),
    Fault("killed client", 1, _client(client_faults.killed_client), hit=DISCONNECTED),
    Fault("slow writer", 1, _client(client_faults.slow_writer), hit=frozenset({OK, "408 body_timeout", REFUSED})),
    Fault("slow reader", 1, _client(client_faults.slow_reader), hit=frozenset({OK})),
    Fault("half-sent body", 1, _client(client_faults.half_sent), hit=DISCONNECTED | {"closed", "408 body_timeout"}),
    *(Fault(f"odd {name}", 1, _fuzz_case(fuzz_case), hit=frozenset({HANDLED})) for name, fuzz_case in CASES.items()),
    Fault("burst", 1, burst, hit=frozenset({OK, REFUSED})),
    Fault("deadline", 1, deadline_exceeded, hit=frozenset({OK, DEADLINE_EXCEEDED})),
)


async def inject_faults(
    server: RestartingServer, interval_s: float, seed: int, counters: Counters, stop: asyncio.Event
) -> None:
    """Injects a fault every `interval_s` seconds on average, until `stop`."""
    rng = random.Random(f"{seed} faults")
    while True:
        try:
            await asyncio.wait_for(stop.wait(), rng.expovariate(1 / interval_s))
            return
        except TimeoutError:
            fault = rng.choice(FAULTS)
        scenario = Scenario(server, random.Random(rng.random()), 1)
        result = fault_result(fault, scenario, await fault.run(scenario), Counter())
        for label, count in result.hit.items():
            counters.seen[f"{fault.name}: {label}"] += count
        for label, count in result.lost_what.items():
            counters.lost[f"{fault.name}: {label}"] += count
