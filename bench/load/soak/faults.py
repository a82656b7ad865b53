"""The seeded faults of a soak, one at a time at random moments: those of chaos and fuzz that leave the process alive.

Faults that end the process are those of bench.robustness.chaos: a new process has a memory of its own, and what grows
over hours could not be seen.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from bench.harness.errors import BenchError
from bench.load.soak.ledger import Ledger
from bench.robustness import client_faults, engine_faults
from bench.robustness.fault import Fault, Seen, row
from bench.robustness.fuzz import CASES, Case
from bench.robustness.process_faults import LATE
from bench.robustness.restarting_server import Supervisor
from bench.robustness.scenario import PATIENCE_S, RIGHT, Stage

REFUSED = "429 queue_full"
ODD = "as it must be"
BURST = 96  # orders at once, more than the queue holds
ENDS_PROCESS = ("hang (exit code 70)", "engine lost (exit code 71)")


def _client(one: Callable[[Stage], Awaitable[str]]) -> Callable[[Stage], Awaitable[Seen]]:
    async def play(stage: Stage) -> Seen:
        try:
            return Counter([await asyncio.wait_for(one(stage), PATIENCE_S)])
        except TimeoutError:
            return Counter(["silence"])
        except (OSError, EOFError, BenchError):
            return Counter(["cut"])

    return play


def _nonsense(case: Case) -> Callable[[Stage], Awaitable[Seen]]:
    async def play(stage: Stage) -> Seen:
        try:
            label = await asyncio.wait_for(case(stage.supervisor, stage.rng), PATIENCE_S)
        except (OSError, EOFError, BenchError, TimeoutError) as error:
            label = f"wrong: {type(error).__name__} {error}"
        return Counter([label if label.startswith("wrong") else ODD])

    return play


async def burst(stage: Stage) -> Seen:
    """More orders at once than the queue holds."""
    return await stage.together(stage.order() for _ in range(BURST))


async def late(stage: Stage) -> Seen:
    """An order that cannot begin in time, behind one that takes half a second."""
    long = asyncio.create_task(stage.ask(stage.order("[[slow]]", 96)))
    hasty = await stage.ask(stage.order(), timeout_ms=1)
    return Counter([hasty, await long])


LEFT = frozenset({"left"})
FAULTS = (
    *(fault for fault in engine_faults.FAULTS if fault.stage == "plain" and fault.name not in ENDS_PROCESS),
    Fault("killed client", 1, _client(client_faults.killed_client), hit=LEFT),
    Fault("slow writer", 1, _client(client_faults.slow_writer), hit=frozenset({RIGHT, "408 body_timeout", REFUSED})),
    Fault("slow reader", 1, _client(client_faults.slow_reader), hit=frozenset({RIGHT})),
    Fault("half-sent body", 1, _client(client_faults.half_sent), hit=LEFT | {"closed", "408 body_timeout"}),
    *(Fault(f"odd {name}", 1, _nonsense(case), hit=frozenset({ODD})) for name, case in CASES.items()),
    Fault("burst", 1, burst, hit=frozenset({RIGHT, REFUSED})),
    Fault("deadline", 1, late, hit=frozenset({RIGHT, LATE})),
)


async def strike(supervisor: Supervisor, every_s: float, seed: int, ledger: Ledger, over: asyncio.Event) -> None:
    """A fault every `every_s` seconds on average, until `over`."""
    rng = random.Random(f"{seed} faults")
    while True:
        try:
            await asyncio.wait_for(over.wait(), rng.expovariate(1 / every_s))
            return
        except TimeoutError:
            fault = rng.choice(FAULTS)
        stage = Stage(supervisor, random.Random(rng.random()), 1)
        told = row(fault, stage, await fault.play(stage), Counter())
        for label, count in told.hit.items():
            ledger.seen[f"{fault.name}: {label}"] += count
        for label, count in told.lost_what.items():
            ledger.lost[f"{fault.name}: {label}"] += count
