"""Soaks one server for hours in mixed traffic of all routes and live sessions, with seeded faults.

    python -m bench.load.soak --hours 2 --out runs/soak
    python -m bench.load.soak --hours 0.05 --warmup-minutes 0.5 --rate 20 --out runs/soak

Starts `python -m server --backend fake`, so that every image is known and checked. Each minute adds a line to
soak.jsonl and redraws soak.svg. The last line is the verdict: the first ten minutes after the warm-up against the last
ten. SIGTERM and SIGINT end it early, with a verdict. Prints a table, then that line. Exit code 1: something was lost or
wrong, memory grew by 2 % or more, files or threads grew, or the median latency by 5 %.
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

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.load.soak.counters import Counters, count_increase
from bench.load.soak.faults import inject_faults
from bench.load.soak.http_clients import HttpClients
from bench.load.soak.live_clients import live_client
from bench.load.soak.process import ProcessState, process_state
from bench.load.soak.report import Span, minute, plot, show, verdict
from bench.robustness.fuzz import warm_up
from bench.robustness.restarting_server import RestartingServer

WINDOW_S = 60.0
SPAN_S = 600.0  # compared at both ends
SAMPLE_S = 1.0
QUEUE = 64  # fewer than the orders of a burst


def flags(delay_ms: float) -> list[str]:
    """Returns the server's flags. The log holds warnings alone, so that hours of it stay small."""
    return [
        *("--backend", "fake", "--fake-delay-ms", str(delay_ms), "--max-queue", str(QUEUE)),
        *("--body-timeout-s", "1.5", "--log-format", "json", "--log-level", "warning", "--compat", "sdapi"),
    ]


class Soak:
    """Runs one server and its clients, and collects their outcomes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out: Path = options.out
        self._server = RestartingServer(flags(options.delay_ms), self._out / "server.log")
        self._counters = Counters()
        self._states: list[ProcessState] = []
        self._minutes: list[dict[str, Any]] = []
        self._stop = asyncio.Event()
        self._start_time = 0.0

    @property
    def _now(self) -> float:
        return time.monotonic() - self._start_time

    async def run(self) -> dict[str, Any]:
        """Returns the verdict. Raises BenchError if it ended before two spans could be compared."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._server.start()
        try:
            await warm_up(self._server)
            self._start_time = time.monotonic()
            loop.call_later(3600 * self._options.hours, self._stop.set)
            await self._run_clients()
        finally:
            code = await self._server.stop()
        if exit_codes := self._server.exit_codes[:-1]:
            self._counters.lost[f"the server left with {exit_codes}"] += 1
        if code:
            self._counters.lost[f"exit code {code} after SIGTERM"] += 1
        return self._verdict()

    async def _run_clients(self) -> None:
        options, counters, start_time, stop = self._options, self._counters, self._start_time, self._stop
        url = f"http://127.0.0.1:{self._server.port}"
        http_clients = HttpClients(url, counters, start_time, options.seed)
        async with asyncio.TaskGroup() as group:
            group.create_task(http_clients.run(options.rate, stop))
            for number in range(options.sessions):
                group.create_task(
                    live_client(url, random.Random(f"{options.seed} {number}"), counters, start_time, stop)
                )
            group.create_task(inject_faults(self._server, options.fault_every_s, options.seed, counters, stop))
            group.create_task(self._watch())

    async def _watch(self) -> None:
        """Samples the process each second and writes a line each minute."""
        previous: dict[str, int] = {}
        begin = 0.0
        while True:
            self._states.append(process_state(self._server.pid, self._now))
            ends = self._stop.is_set()
            if self._now >= begin + WINDOW_S or (ends and self._now > begin):
                span = Span(begin, self._now)
                row = minute(self._states, self._counters, span)
                row |= {"seen": count_increase(previous, self._counters.seen), "lost": dict(self._counters.lost)}
                self._minutes.append(row)
                self._write(row)
                (self._out / "soak.svg").write_text(plot(self._minutes))
                begin, previous = span.end, dict(self._counters.seen)
            if ends:
                return
            try:
                await asyncio.wait_for(self._stop.wait(), SAMPLE_S)
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
        result = {
            "program": "bench.load.soak",
            "command": self._options.command,
            "machine": host_facts(),
            "server": flags(self._options.delay_ms),
            "seconds": round(end, 1),
            **verdict(self._states, self._counters, Span(warm, warm + span), Span(end - span, end)),
        }
        self._write(result)
        return result


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = BenchmarkParser("bench.load.soak", __doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--warmup-minutes", type=float, default=10.0, help="before anything is compared (default 10)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second on average (default 5)")
    parser.add_argument("--sessions", type=int, default=3, help="live sessions at the same time (default 3)")
    parser.add_argument("--fault-every-s", type=float, default=10.0, help="on average (default 10)")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of a batch of the fake engine (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for soak.jsonl, soak.svg, server.log")
    options = parser.options(argv)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out: got {options.out}, which is not empty; needed is a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(lambda: asyncio.run(Soak(options).run()), show, lambda result: result["broken"])


if __name__ == "__main__":
    sys.exit(main())
