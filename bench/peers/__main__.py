"""Compares our server with common servers around the same engine, under the same load, in one run.

    make peers
    python -m bench.peers --engine fake:5 --rates 50,100,200 --concurrency 1,8,64 --seconds 3

Peers: FastAPI on its thread pool, LitServe, Ray Serve with @serve.batch, BentoML's adaptive batching (files *_app.py).
`make peers` makes an environment for each. One server runs at a time, and one load generator on the same machine
measures all. Every peer has our engine, our PNG encoder and batches of 8; those that wait for a batch to fill wait 5
ms. A request without status 200 counts as lost. OpenMP's threads sleep while they wait, in every peer. Figures are
medians of the repetitions. CPU time and context switches are those of the server's processes, where these stay in its
session.
"""

import sys
from collections.abc import Sequence

from bench.harness.cli import BenchmarkParser, comma_list, run_benchmark
from bench.peers.comparison import PEERS, run, show


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.peers", __doc__)
    parser.add_argument("--engine", nargs="+", default=["fake:5", "models/tiny"], help="fake:<ms>, or a checkpoint")
    parser.add_argument("--peers", type=comma_list(str, PEERS), default=PEERS, help=f"of {','.join(PEERS)}")
    parser.add_argument("--concurrency", type=comma_list(int), default=(1, 8, 64), help="closed loops (default 1,8,64)")
    parser.add_argument("--rates", type=comma_list(int), default=(50, 100, 200), help="open loops, requests a second")
    parser.add_argument("--seconds", type=float, default=3.0, help="about as long each load lasts (default 3)")
    parser.add_argument("--repetitions", type=int, default=3, help="of all, peers in turn (default 3)")
    options = parser.options(argv)
    if options.repetitions < 1:
        parser.error(f"repetitions: got {options.repetitions}, allowed: 1 or more")
    return run_benchmark(
        lambda: run(options), show, lambda result: any(row["lost"] for row in result["rows"] if row["peer"] == "ours")
    )


if __name__ == "__main__":
    sys.exit(main())
