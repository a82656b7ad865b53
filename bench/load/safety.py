"""Measures what --safety costs the requests that are not refused: p99 with checks, without, and beside refused ones.

    python -m bench.load.safety
    python -m bench.load.safety --image opennsfw --rate 4

Two servers on the fake engine, one with checks. A turn sends three loads at the same Poisson times, in another order
each: `off` to the server without checks, `on` to the one with them, and `refused`, the load of `on` with prompts beside
it that the list refuses. Ratios are those of medians of p99 over turns. Prints a table, then one JSON document as the
last line. Exit code 1: a bound is broken. Bounds: p99 of `refused` over `on` at most 1.05, over `off` too unless images
are checked; every request is answered as it must be.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.server_process import running_server
from bench.harness.summary import percentiles, table

LOADS = ("off", "on", "refused")
MAX_RATIO = 1.05
WORD = "forbidden"
SIDE = 64


def requests(prompt: str, count: int, seed: int) -> list[ImageRequest]:
    return [ImageRequest(prompt, seed * 10**6 + i, 1, "jpeg", SIDE, SIDE) for i in range(count)]


async def open_loop(url: str, prompt: str, rate: float, seconds: float, seed: int) -> list[RequestRecord]:
    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool)
        try:
            return await generator.open_loop(requests(prompt, round(rate * seconds), seed), rate, seed)
        finally:
            await generator.close()


async def turn(url: str, options: argparse.Namespace, seed: int, *, refused: bool) -> dict[str, Any]:
    """Returns the latencies in ms of the requests that are to get images, and the number of wrong answers."""
    loads = [open_loop(url, "a red circle", options.rate, options.seconds, seed)]
    if refused:
        rate = options.rate * options.share
        loads.append(open_loop(url, f"a {WORD} circle", rate, options.seconds, seed + 10**3))
    records, *others = await asyncio.gather(*loads)
    wrong = sum(record.status != 200 for record in records)
    wrong += sum(record.status != 422 for record in others[0]) if others else 0
    milliseconds = [1000 * record.seconds for record in records if record.status == 200]
    return {"latency_ms": percentiles(milliseconds), "refused": len(others[0]) if others else 0, "wrong": wrong}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError if a server does not start or stop."""
    flags = ["--backend", "fake", "--fake-delay-ms", str(options.batch_ms), "--log-level", "warning"]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADS}
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words.txt"
        words.write_text(f"{WORD}\n", encoding="utf-8")
        safety = f"prompt={words}" + (f",image={options.image}" if options.image else "")
        with running_server(flags) as plain, running_server([*flags, "--safety", safety]) as checked:
            urls = {"off": plain.url, "on": checked.url, "refused": checked.url}
            for number in range(options.turns + 1):
                first = number % len(LOADS)
                for name in (*LOADS[first:], *LOADS[:first]):
                    seed = options.seed + number
                    done = asyncio.run(turn(urls[name], options, seed, refused=name == "refused"))
                    if number:  # the first turn warms up
                        turns[name].append(done)
    return {
        "program": "bench.load.safety",
        "command": options.command,
        "machine": host_facts(),
        "image": options.image,
        "batch_ms": options.batch_ms,
        **summarise(turns, images_are_checked=bool(options.image)),
    }


def summarise(turns: Mapping[str, Sequence[Mapping[str, Any]]], *, images_are_checked: bool) -> dict[str, Any]:
    """Returns medians of the p50 and p99 of each load over its turns in ms, ratios of p99, and broken bounds."""
    loads = {
        name: {
            **{key: round(median(one["latency_ms"][key] for one in of), 3) for key in ("p50", "p99")},
            "requests": sum(one["latency_ms"]["count"] for one in of),
            "refused": sum(one["refused"] for one in of),
            "wrong": sum(one["wrong"] for one in of),
        }
        for name, of in turns.items()
    }
    pairs = {"on/off": ("on", "off"), "refused/on": ("refused", "on"), "refused/off": ("refused", "off")}
    ratios = {label: round(loads[one]["p99"] / loads[other]["p99"], 4) for label, (one, other) in pairs.items()}
    bounded = ["refused/on"] if images_are_checked else ["refused/on", "refused/off"]
    broken = [f"p99 {label}: {ratios[label]}, at most {MAX_RATIO}" for label in bounded if ratios[label] > MAX_RATIO]
    broken += [f"{load['wrong']} wrong answers to the load {name}" for name, load in loads.items() if load["wrong"]]
    return {"loads": loads, "p99_ratios": ratios, "turns": len(turns["off"]), "broken": broken}


def show(result: Mapping[str, Any]) -> str:
    """Returns the table for people, the ratios, and the broken bounds."""
    columns = ("requests", "refused", "wrong", "p50", "p99")
    rows = [[name, *(load[key] for key in columns)] for name, load in result["loads"].items()]
    ratios = ", ".join(f"{label} {ratio}" for label, ratio in result["p99_ratios"].items())
    head = ("load", "images", "refused", "wrong", "p50, ms", "p99, ms")
    return "\n".join([table(head, rows), f"p99: {ratios}", *(result["broken"] or ["every bound holds"])])


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.load.safety", __doc__)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second (default 40)")
    parser.add_argument("--share", type=float, default=0.2, help="refused ones beside them (default 0.2 of the rate)")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each load in a turn (default 25)")
    parser.add_argument("--turns", type=int, default=5, help="after one that warms up (default 5)")
    parser.add_argument("--batch-ms", type=float, default=10.0, help="time of a batch (default 10)")
    parser.add_argument("--image", help="checker of images too, such as opennsfw; default: of prompts alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: result["broken"])


if __name__ == "__main__":
    sys.exit(main())
