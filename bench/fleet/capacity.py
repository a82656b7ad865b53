"""Makes the tables of docs/operate/capacity.md: cards for a rate, a lost card, and the effect of each setting.

    python -m bench.fleet.capacity --stages bench/results/h100-2026-11-27.jsonl

Stage times are those of the file; everything else is simulated from them. Prints the tables, then one JSON document as
the last line.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.fleet.replica import Limits
from bench.fleet.run import LatencyGoal, SimulationConfig, fewest_cards, simulate
from bench.fleet.simulation import Fleet
from bench.fleet.stages import Stages, load_stages
from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.host import host_facts
from bench.harness.summary import table

RATES = (10.0, 1000.0, 100_000.0)
GOALS = (LatencyGoal(100.0), LatencyGoal(250.0), LatencyGoal(1000.0))
PEAK, BUSY = 10, 0.85  # cards, and the load at the peak as a share of full batches' throughput
LOST_AT_S = 60.0


def for_rates(config: SimulationConfig, stages: Stages) -> list[dict[str, Any]]:
    """Returns the fewest cards for each rate and goal."""
    rows = []
    for rate in RATES:
        for goal in GOALS:
            result = fewest_cards(replace(config, rate=rate), stages, goal)
            rows.append({"rate": rate, "goal_ms": goal.p99_ms, **result, "a_card": round(rate / result["cards"], 1)})
    return rows


def after_a_loss(config: SimulationConfig, stages: Stages, rate: float) -> list[dict[str, Any]]:
    """Simulates PEAK cards that lose none, one or three, each away for a cold start."""
    rows = []
    for cards in (0, 1, 3):
        lost = ((LOST_AT_S, cards),) if cards else ()
        fleet = replace(config.fleet, cards=PEAK, lost=lost, start_s=stages.ready_s)
        rows.append({"lost": cards, **simulate(replace(config, fleet=fleet, rate=rate, max_events=1e9), stages)})
    return rows


def by_setting(config: SimulationConfig, stages: Stages, rate: float) -> list[dict[str, Any]]:
    """Simulates PEAK cards at the peak and at a fifth above capacity, with one setting changed at a time."""
    changed = {
        "as shipped": replace(config.fleet, cards=PEAK),
        **{f"max-batch {n}": replace(config.fleet, cards=PEAK, limits=Limits(max_batch=n)) for n in (1, 2, 4)},
        **{f"max-queue {n}": replace(config.fleet, cards=PEAK, limits=Limits(max_queue=n)) for n in (8, 32, 512)},
        "timeout-ms 1000": replace(config.fleet, cards=PEAK, limits=Limits(timeout_s=1.0)),
        "a balancer at random": replace(config.fleet, cards=PEAK, routing="random"),
    }
    rows = []
    for name, fleet in changed.items():
        for share in (1.0, 1.2 / BUSY):
            row = simulate(replace(config, fleet=fleet, rate=rate * share, max_events=1e9), stages)
            rows.append({"setting": name, "over": share > 1, **row})
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    stages = load_stages(options.stages, options.precision)
    config = SimulationConfig(Fleet(1, options.seconds, seed=options.seed), 0.0, max_events=options.events)
    (batches,) = [row for key, row in stages.batches.items() if key == (1024, 1024, 1)]
    full = 8 / (batches[8].before + 8 * batches[8].each)
    peak = round(BUSY * PEAK * full)
    return {
        "program": "bench.fleet.capacity",
        "command": options.command,
        "machine": host_facts(),
        "stages": stages.source,
        "full_batches_a_second": round(full, 2),
        "peak": peak,
        "rates": for_rates(config, stages),
        "losses": after_a_loss(config, stages, peak),
        "settings": by_setting(config, stages, peak),
    }


def show(rows: dict[str, Any]) -> str:
    rates = [
        [row["rate"], row["goal_ms"], row["cards"], row["a_card"], row["p50_ms"], row["p99_ms"], row["simulated_cards"]]
        for row in rows["rates"]
    ]
    losses = [
        [row["lost"], row["p50_ms"], row["p95_ms"], row["p99_ms"], row["refused"], row["asked_again"], row["dropped"]]
        for row in rows["losses"]
    ]
    settings = [
        [
            row["setting"],
            row["rate"],
            row["p50_ms"],
            row["p99_ms"],
            row["throughput"],
            row["goodput"],
            f"{row['failed_share']:.2%}",
        ]
        for row in rows["settings"]
    ]
    return "\n".join(
        [
            table(
                ("images/s", "p99 at most, ms", "cards", "images/s a card", "p50, ms", "p99, ms", "simulated"), rates
            ),
            "",
            f"{PEAK} cards at {rows['peak']} images/s; cards are lost at second {LOST_AT_S:g}:",
            table(("lost", "p50, ms", "p95, ms", "p99, ms", "refused", "asked again", "dropped"), losses),
            "",
            f"{PEAK} cards at the peak and at more than they can do:",
            table(("setting", "requests/s", "p50, ms", "p99, ms", "images/s", "within 1 s", "failed"), settings),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.fleet.capacity", __doc__)
    parser.add_argument("--stages", required=True, help="a .jsonl that a card was measured into, or a .json of rows")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--seconds", type=float, default=180.0, help="of each simulation (default 180)")
    parser.add_argument("--events", type=float, default=2e5, help="of each simulation at most (default 200,000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show)


if __name__ == "__main__":
    sys.exit(main())
