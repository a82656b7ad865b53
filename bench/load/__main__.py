"""Loads a server over HTTP in a closed or open loop: latency, throughput, goodput, batches, memory, image checks.

    python -m bench.load --concurrency 64 --requests 20000 --size 64x64 --check fake -- --backend fake
    python -m bench.load --rate 200 --seconds 30 --deadline-ms 100 -- --backend fake --fake-delay-ms 5
    python -m bench.load --url http://127.0.0.1:8000 --concurrency 8 --requests 200 --check judge

Starts its own server with the flags behind `--`, unless --url names one, which nobody else may use meanwhile. Prints a
table, then one JSON document as the last line. Exit code 1: a response was lost, or an image belongs to another
request.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from bench.harness.cli import BenchmarkParser, parse_size, run_benchmark
from bench.harness.load_generator import FORMATS
from bench.load.image_checks import Check
from bench.load.run import is_wrong, measure, show


def _int_at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text}, needed is {minimum} at least")
        return int(text)

    return parse


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options; `flags` are the server's. Exits with code 2 if they contradict each other."""
    parser = BenchmarkParser("bench.load", __doc__)
    positive = _int_at_least(1)
    parser.add_argument("--concurrency", type=positive, help="closed loop: clients that wait for their answers")
    parser.add_argument("--requests", type=positive, help="closed loop: how many in all")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--seconds", type=float, help="open loop: how long")
    parser.add_argument("--url", help="a running server, instead of one of our own")
    parser.add_argument("--size", type=parse_size, help="N or WxH of the images (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--format", default="png", choices=FORMATS)
    parser.add_argument("--prompts", type=positive, default=500, help="different captions (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of captions, arrival times and the first image")
    parser.add_argument("--timeout-ms", type=positive, help="sent with every request")
    parser.add_argument("--deadline-ms", type=float, default=1000.0, help="what goodput counts (default 1000)")
    parser.add_argument("--patience-s", type=float, default=120.0, help="an answer that takes longer is lost")
    parser.add_argument("--warmup", type=_int_at_least(0), default=64, help="requests before the run (default 64)")
    parser.add_argument("--check", default="none", choices=get_args(Check), help="what images are held against")
    parser.add_argument("--check-sample", type=positive, default=32, help="images that --check rerun makes again")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of our own server")
    options = parser.options(argv)
    closed = (options.concurrency, options.requests)
    loops = [all(value is not None for value in pair) for pair in (closed, (options.rate, options.seconds))]
    if sum(loops) != 1 or sum(value is not None for value in (*closed, options.rate, options.seconds)) != 2:
        parser.error("needed is either --concurrency and --requests or --rate and --seconds")
    if options.url and (options.flags or options.check == "rerun"):
        parser.error("--url takes no flags of a server, and --check rerun needs a server of our own")
    if options.format != "png" and options.check in ("fake", "rerun"):
        parser.error(f"--check {options.check} compares pixels: --format png is needed, got {options.format}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(lambda: measure(options), show, is_wrong)


if __name__ == "__main__":
    sys.exit(main())
