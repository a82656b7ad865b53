"""Measures the server over HTTP, with projections and diffusers for comparison.

    python -m bench.acceptance.over_http    # 0.6B and 1.6B with random weights, on a GPU
    python -m bench.acceptance.over_http --device cpu --quick --models tiny    # any machine

Prints one JSON line for each figure and writes it to --out at once. --minutes limits a call; the next call goes on
where it ended. Exit code 1: a figure failed or was left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.acceptance.over_http.beside import count, measure_peer
from bench.acceptance.over_http.client import figures_of, fresh_prompts, get_body
from bench.acceptance.over_http.figures import About, Figures
from bench.harness.cli import comma_separated
from bench.harness.errors import BenchError
from bench.harness.server_process import ROOT, running_server
from bench.harness.subprocess_call import run_in_subprocess
from engines.checkpoints.checkpoint import open_checkpoint

MODELS = ("random:sprint-0.6b", "random:sprint-1.6b")
PEER_LIMIT_S = 900.0  # compiling takes minutes
FACTS = ("checkpoint", "backend", "versions", "replaced_kernels", "reasons", "start_s", "default_size")  # of /v1/info


def main(argv: Sequence[str] | None = None) -> int:
    options = _parsed(argv)
    path = options.out / f"over-http-{_card(options.device)}.jsonl"
    figures = Figures(path, time.monotonic() + options.minutes * 60, time.monotonic)
    for model in options.models:
        for precision in options.precisions:
            about = {"model": model, "precision": precision, "device": _card(options.device)}
            if options.engine not in (None, "none"):
                about["engine"] = options.engine
            _over_http(figures, about, options)
            if _asked(options, "projected"):
                _projected(figures, about, options)
        peers = {"model": model, "precision": "bf16" if options.device == "cuda" else "fp32"}
        for peer in options.peers:
            about = {**peers, "device": _card(options.device)}
            figures.take(about, peer, lambda one=peer, of=about: _peer(one, of, options))  # type: ignore[misc]  # default
    return int(figures.left_out > 0)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance.over_http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=comma_separated, default=MODELS, help="folders, hub ids, random:<name>; with commas"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precisions", type=comma_separated, help="default bf16,fp8 on a GPU, fp32 on a CPU")
    parser.add_argument("--peers", type=comma_separated, help="default diffusers,diffusers-compiled; '' for none")
    parser.add_argument("--controlnet", help="for checkpoints that have none")
    parser.add_argument(
        "--engine", help="folder of a built engine of the one precision, or none: the server builds none"
    )
    parser.add_argument("--figures", type=comma_separated, help="names of the figures, with commas; default all")
    parser.add_argument("--skip", type=comma_separated, default=(), help="names of figures that are left out")
    parser.add_argument("--quick", action="store_true", help="three requests of each kind, one and two clients")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing else is begun (default 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the file")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: torch sees no GPU; --device cpu --quick proves the program on a CPU")
    if options.precisions is None:
        options.precisions = ("bf16", "fp8") if options.device == "cuda" else ("fp32",)
    if options.peers is None:
        options.peers = ("diffusers",) if options.quick else ("diffusers", "diffusers-compiled")
    return options


def _card(device: str) -> str:
    return torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"


def _over_http(figures: Figures, about: About, options: argparse.Namespace) -> None:
    """Starts the server once and takes all figures that the file lacks."""
    checkpoint = open_checkpoint(about["model"])
    runs, clients, each = (3, (1, 2), 2) if options.quick else (40, (1, 8, 32), 12)
    flags = ["--model", about["model"], "--device", options.device]
    flags += [] if "engine" in about else ["--precision", about["precision"]]
    flags += ["--engine", options.engine] if options.engine else []
    if options.controlnet:
        flags += ["--controlnet", options.controlnet]
    optional = set() if options.figures or options.controlnet else {"controlnet alone", "live"}
    known = figures_of("", iter(()), runs=1, clients=clients, each=1, control=True)
    names = [name for name in ("ready", *(name for name, _ in known)) if _asked(options, name)]
    if all(figures.has(about, name) for name in names if name not in optional):
        return
    if figures.late:
        figures.left_out += 1
        return
    try:
        with running_server(flags) as server:
            info = json.loads(get_body(server.url, "/v1/info"))
            facts = {key: info[key] for key in FACTS}
            seconds = round(server.start_seconds, 2)
            if _asked(options, "ready"):
                figures.take(about, "ready", lambda: {"seconds": seconds, **facts})
            measures = figures_of(
                server.url,
                fresh_prompts(checkpoint, 20),
                runs=runs,
                clients=clients,
                each=each,
                control="control" in info["conditioning"],
            )
            for name, measure in measures:
                if _asked(options, name):
                    figures.take(about, name, measure)
    except BenchError as error:  # it did not start, or did not leave as it should
        figures.fail(about, "server", error)


def _asked(options: argparse.Namespace, name: str) -> bool:
    return name not in options.skip and (options.figures is None or name in options.figures)


def _projected(figures: Figures, about: About, options: argparse.Namespace) -> None:
    """Takes the projection of a request on a GPU; a CPU run projects bf16."""
    precision = about["precision"] if options.device == "cuda" else "bf16"
    size = open_checkpoint(about["model"]).settings.default_size

    figures.take(about, "projected", lambda: run_in_subprocess(PEER_LIMIT_S, count, about["model"], size, precision))


def _peer(peer: str, about: About, options: argparse.Namespace) -> dict[str, Any]:
    runs = 2 if options.quick else 15
    return run_in_subprocess(PEER_LIMIT_S, measure_peer, peer, about["model"], about["precision"], options.device, runs)


if __name__ == "__main__":
    sys.exit(main())
