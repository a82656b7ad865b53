"""Hours of mixed traffic of all routes and live sessions, with seeded faults, on one real server: does anything grow?

    python -m bench.load.soak --hours 2 --out runs/soak
    python -m bench.load.soak --hours 0.05 --warmup-minutes 0.5 --rate 20 --out runs/soak

Starts `python -m server --backend fake`, so that every picture is known and checked. A minute is a line of
soak.jsonl; soak.svg is drawn anew after each. The last line is the verdict: the first ten minutes after the warm-up
against the last ten. SIGTERM and SIGINT end it early, with its verdict. Prints a table, then that line. Exit code 1
where anything was lost or wrong, memory grew by 2 % or more, files or threads grew, or the median latency by 5 %.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.cli import command, told
from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.load.soak.customers import Customers
from bench.load.soak.drawers import drawer
from bench.load.soak.faults import strike
from bench.load.soak.ledger import Ledger, added
from bench.load.soak.process import State, state
from bench.load.soak.report import Span, minute, plot, show, verdict
from bench.robustness.fuzz import fill
from bench.robustness.restarting_server import Supervisor

WINDOW_S = 60.0
SPAN_S = 600.0  # what is compared, at both ends
SAMPLE_S = 1.0
QUEUE = 64  # fewer than the orders of a burst


def flags(delay_ms: float) -> list[str]:
    """Of the server. The log says only what is wrong, so that hours of it stay small."""
    return [
        *("--backend", "fake", "--fake-delay-ms", str(delay_ms), "--max-queue", str(QUEUE)),
        *("--body-timeout-s", "1.5", "--log-format", "json", "--log-level", "warning", "--compat", "sdapi"),
    ]


class Soak:
    """One server, everyone who uses it, and what was seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out: Path = options.out
        self._server = Supervisor(flags(options.delay_ms), self._out / "server.log")
        self._ledger = Ledger()
        self._states: list[State] = []
        self._minutes: list[dict[str, Any]] = []
        self._over = asyncio.Event()
        self._began = 0.0

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    async def run(self) -> dict[str, Any]:
        """The verdict. Raises BenchError where it ended before anything could be compared."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        await self._server.start()
        try:
            await fill(self._server)
            self._began = time.monotonic()
            loop.call_later(3600 * self._options.hours, self._over.set)
            await self._everyone()
        finally:
            code = await self._server.stop()
        if codes := self._server.codes[:-1]:
            self._ledger.lost[f"the server left with {codes}"] += 1
        if code:
            self._ledger.lost[f"exit code {code} after SIGTERM"] += 1
        return self._verdict()

    async def _everyone(self) -> None:
        options, ledger, began, over = self._options, self._ledger, self._began, self._over
        url = f"http://127.0.0.1:{self._server.port}"
        customers = Customers(url, ledger, began, options.seed)
        async with asyncio.TaskGroup() as group:
            group.create_task(customers.arrive(options.rate, over))
            for number in range(options.sessions):
                group.create_task(drawer(url, random.Random(f"{options.seed} {number}"), ledger, began, over))
            group.create_task(strike(self._server, options.fault_every_s, options.seed, ledger, over))
            group.create_task(self._watch())

    async def _watch(self) -> None:
        """A state each second, a line each minute."""
        seen: dict[str, int] = {}
        begin = 0.0
        while True:
            self._states.append(state(self._server.pid, self._now))
            ends = self._over.is_set()
            if self._now >= begin + WINDOW_S or (ends and self._now > begin):
                span = Span(begin, self._now)
                row = minute(self._states, self._ledger, span)
                row |= {"seen": added(seen, self._ledger.seen), "lost": dict(self._ledger.lost)}
                self._minutes.append(row)
                self._write(row)
                (self._out / "soak.svg").write_text(plot(self._minutes))
                begin, seen = span.end, dict(self._ledger.seen)
            if ends:
                return
            try:
                await asyncio.wait_for(self._over.wait(), SAMPLE_S)
            except TimeoutError:
                continue

    def _write(self, row: dict[str, Any]) -> None:
        with (self._out / "soak.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _verdict(self) -> dict[str, Any]:
        warm, end = 60 * self._options.warmup_minutes, self._states[-1].at
        span = min(SPAN_S, (end - warm) / 3)
        if span <= 2 * SAMPLE_S:
            raise BenchError(f"it ended after {end:.0f} s, needed are more than {warm + 6 * SAMPLE_S:.0f} s")
        found = {
            "program": "bench.load.soak",
            "command": self._options.command,
            "machine": machine(),
            "server": flags(self._options.delay_ms),
            "seconds": round(end, 1),
            **verdict(self._states, self._ledger, Span(warm, warm + span), Span(end - span, end)),
        }
        self._write(found)
        return found


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--warmup-minutes", type=float, default=10.0, help="before anything is compared (default 10)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second on average (default 5)")
    parser.add_argument("--sessions", type=int, default=3, help="live sessions at the same time (default 3)")
    parser.add_argument("--fault-every-s", type=float, default=10.0, help="on average (default 10)")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of a batch of the fake engine (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for soak.jsonl, soak.svg, server.log")
    parser.set_defaults(command=command("bench.load.soak", argv))
    options = parser.parse_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out: got {options.out}, which is not empty; needed is a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(sys.argv[1:] if argv is None else argv)
    return told(lambda: asyncio.run(Soak(options).run()), show, lambda found: found["broken"])


if __name__ == "__main__":
    sys.exit(main())
