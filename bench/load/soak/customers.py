"""Customers of the HTTP routes: requests at random times, each asked again until it has its right answer."""

import asyncio
import random
import time

from bench.harness.errors import BenchError
from bench.harness.http_client import Answer, Pool
from bench.load.soak.ledger import Ledger
from bench.load.soak.orders import Ask, ask
from bench.robustness.scenario import AGAIN_S, PATIENCE_S

REFUSED = "429 queue_full"  # what a burst of others excuses; the customer asks again


class Customers:
    """Open loop: `rate` requests a second on average, whatever the server does."""

    def __init__(self, url: str, ledger: Ledger, began: float, seed: int) -> None:
        self._pool = Pool(url)
        self._ledger, self._began = ledger, began
        self._rng = random.Random(f"{seed} customers")

    async def arrive(self, rate: float, over: asyncio.Event) -> None:
        """Sends requests until `over`, and returns once all are answered."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as inside:
            while not over.is_set():
                due += self._rng.expovariate(rate)
                pause = asyncio.create_task(over.wait())
                await asyncio.wait((pause,), timeout=max(0.0, due - time.monotonic()))
                pause.cancel()
                inside.create_task(self._customer(ask(self._rng), due))
        await self._pool.close()

    async def _customer(self, wanted: Ask, due: float) -> None:
        end = due + PATIENCE_S
        label, right = "", str(wanted.status)
        while time.monotonic() < end:
            answer = await self._once(wanted)
            seconds = time.monotonic() - due
            label = answer if isinstance(answer, str) else wanted.label(answer)
            self._ledger.tell(wanted.kind, label, (right, REFUSED))
            if label == right:
                self._ledger.timed(time.monotonic() - self._began, wanted.kind, seconds)
                return
            await asyncio.sleep(AGAIN_S)
            due = time.monotonic()  # a latency is that of one attempt
        self._ledger.tell(wanted.kind, f"never answered, at last {label}", ())

    async def _once(self, wanted: Ask) -> Answer | str:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._pool.exchange(wanted.method, wanted.path, wanted.body, wanted.media_type)
        except TimeoutError:
            return "silence"
        except (OSError, EOFError, BenchError) as error:
            return f"cut: {type(error).__name__}"
