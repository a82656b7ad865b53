"""Simulates a fleet of cards under a load: the server's own queue, batches and deadlines on virtual time.

    python -m bench.fleet --cards 4 --rate 150 --seconds 600 --stages bench/results/h100-2026-11-27.jsonl
    python -m bench.fleet --rate 1000 --p99-ms 500 --seconds 600 --stages bench/results/h100-2026-11-27.jsonl
    python -m bench.fleet --cards 2 --rate 60 --seconds 60 --stages fake:50 --plot fleet.svg

Without --cards it finds the fewest that reach --p99-ms. Traffic of more than --events is simulated on a part of the
fleet with its share; `simulated_cards` has its size. Prints a table, then one JSON document as the last line. Not
modelled: the network, the host's processors, and a card that is slow without failing.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.fleet.arrivals import ARRIVALS, parse_mix, read_arrivals
from bench.fleet.replica import Limits
from bench.fleet.routing import POLICIES
from bench.fleet.run import DAY_S, LatencyGoal, SimulationConfig, fewest_cards, simulate
from bench.fleet.scaling import RULES
from bench.fleet.simulation import Fleet
from bench.fleet.stages import load_stages
from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.summary import table
from bench.harness.svg_chart import Panel, line_panels


def parser() -> BenchmarkParser:
    own = BenchmarkParser("bench.fleet", __doc__)
    add = own.add_argument
    add("--cards", type=int, help="one server each; left out: as few as reach --p99-ms")
    add("--rate", type=float, default=0.0, help="requests a second, on average, of the whole fleet")
    add("--seconds", type=float, default=600.0, help="of traffic (default 600)")
    add("--stages", required=True, help="a .jsonl that a card was measured into, a .json of rows, or fake:MS")
    add("--precision", default="bf16", choices=("bf16", "fp8"), help="of measured stages (default bf16)")
    add("--http-ms", type=float, help="of a request, beside engine and encoder (default: as measured, or 0)")
    add("--arrivals", default="poisson", help=f"{', '.join(ARRIVALS)}, or a file of recorded ones (default poisson)")
    add("--period-s", type=float, default=DAY_S, help="the day of diurnal arrivals (default 86400)")
    add(
        "--mix",
        type=parse_mix,
        default=parse_mix("1024:1:1"),
        help="SIZE:STEPS:SHARE, several with commas (default 1024:1:1)",
    )
    add("--clients", type=int, default=0, help="closed loop instead of --rate: so many, each waiting for its answer")
    add("--max-batch", type=int, default=8)
    add("--max-queue", type=int, default=128)
    add("--timeout-ms", type=float, default=30_000.0)
    add("--routing", default="two", choices=POLICIES, help="two (Ray Serve), random (Kubernetes), connections")
    add("--lose", action="append", default=[], metavar="CARDS@SECOND", help="cards fail then; may be repeated")
    add("--scale", default="none", choices=RULES, help="whose rule adds and ends replicas (default none)")
    add("--least", type=int, default=1, help="replicas with --scale")
    add("--most", type=int, default=10_000, help="replicas with --scale")
    add("--target-waiting-jobs", type=int, default=8, help="at each, beyond which another one starts (default 8)")
    add("--upscale-delay-s", type=float, default=10.0, help="with --scale cluster (default 10)")
    add("--downscale-delay-s", type=float, default=300.0, help="with --scale cluster (default 300)")
    add("--start-s", type=float, help="of a cold start (default: what was measured until ready)")
    add("--deadline-ms", type=float, default=1000.0, help="what goodput counts (default 1000)")
    add("--warmup-s", type=float, default=0.0, help="of the traffic, not counted")
    add("--p99-ms", type=float, default=1000.0, help="the goal without --cards (default 1000)")
    add("--price", type=float, help="of a card for an hour, in any currency")
    add("--events", type=float, default=5e6, help="simulated at most (default 5 million)")
    add("--plot", type=Path, help="an SVG of the latencies and of the cards over time")
    add("--seed", type=int, default=0)
    return own


def config_of(options: argparse.Namespace, ready_s: float) -> SimulationConfig:
    """Returns the simulation of these options. Raises BenchError."""
    if bool(options.rate) + bool(options.clients) + (options.arrivals not in ARRIVALS) != 1:
        raise BenchError("needed is one of --rate, --clients and a file as --arrivals")
    fleet = Fleet(
        cards=options.cards or 1,
        seconds=options.seconds,
        limits=Limits(options.max_batch, options.max_queue, options.timeout_ms / 1000),
        routing=options.routing,
        lost=tuple(map(_parse_loss, options.lose)),
        start_s=ready_s if options.start_s is None else options.start_s,
        least=options.least,
        most=options.most,
        clients=options.clients,
        warmup_s=options.warmup_s,
        seed=options.seed,
    )
    return SimulationConfig(
        fleet,
        options.rate,
        shares=tuple(options.mix),
        arrivals=options.arrivals,
        period_s=options.period_s,
        recorded=() if options.arrivals in ARRIVALS else tuple(read_arrivals(Path(options.arrivals))),
        scale=options.scale,
        target_waiting_jobs=options.target_waiting_jobs,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        deadline_ms=options.deadline_ms,
        price=options.price,
        max_events=options.events,
    )


def _parse_loss(text: str) -> tuple[float, int]:
    cards, _, second = text.partition("@")
    try:
        return float(second), int(cards)
    except ValueError as error:
        raise BenchError(f"--lose: got {text!r}, needed is CARDS@SECOND, such as 1@300") from error


def measure(options: argparse.Namespace) -> dict[str, Any]:
    stages = load_stages(options.stages, options.precision, options.http_ms)
    config = config_of(options, stages.ready_s)
    result = simulate(config, stages) if options.cards else fewest_cards(config, stages, LatencyGoal(options.p99_ms))
    if options.plot:
        options.plot.write_text(plot(result))
    return {"program": "bench.fleet", "command": options.command, "machine": host_facts(), **result}


def show(result: dict[str, Any]) -> str:
    names = [name for name in result if name not in ("program", "command", "machine", "cards_over_time")]
    return table(("fact", "value"), [[name.replace("_", " "), result[name]] for name in names])


def plot(result: dict[str, Any]) -> str:
    steps = [(float(at), float(cards)) for at, cards in result["cards_over_time"]]
    steps.append((result["seconds"], steps[-1][1]))
    corners = [(at, before[1]) for before, (at, _) in pairwise(steps)]
    cards = sorted([*steps, *corners])
    latencies = [(float(share), result[f"p{share}_ms"] or 0.0) for share in (50, 95, 99)]
    panels = [
        Panel("latency by percentile, ms", {"latency": latencies}),
        Panel("cards that are ready, by second", {"cards": cards}),
    ]
    return line_panels(f"{result['rate']:g} requests/s on {result['cards']} cards", "", panels)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().options(argv)
    return run_benchmark(lambda: measure(options), show)


if __name__ == "__main__":
    sys.exit(main())
