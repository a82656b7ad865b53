"""Makes the images of a prompt set, for the public evaluators and for bench.quality.metrics.

    python -m bench.quality.images --prompts meta_data.json --model sprint-0.6b --out runs/mjhq
    python -m bench.quality.images --prompts evaluation_metadata.jsonl --model sprint-0.6b --steps 2 --out runs/geneval
    python -m bench.quality.images --prompts tiny:1000 --url http://127.0.0.1:8000 --workers 2 --out runs/tiny

Writes <out>/images in the evaluators' layout and format, and <out>/manifest.json with the origin of the images. A
stopped run can be continued. Image j of prompt i has the seed --seed + i * samples + j. Upstream draws all images from
one running generator, which neither a stopped run nor a second worker could continue. Guidance is upstream's. Prints a
table, then one JSON document as the last line. Exit code 1: images are missing.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from bench.harness.cli import BenchmarkParser, parse_size, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.summary import table
from bench.quality.images.layouts import SAMPLES
from bench.quality.images.makers import EngineMaker, HttpMaker, Maker, ProcessMaker, SamplingOptions
from bench.quality.images.prompt_sets import KINDS, read_prompt_set
from bench.quality.images.run import make_images
from engines.sampler import Schedule


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = BenchmarkParser("bench.quality.images", __doc__)
    parser.add_argument("--prompts", required=True, help="file or folder of prompts, or tiny:<count>")
    parser.add_argument("--kind", choices=KINDS, help="of the prompts (default: by the file's name)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    parser.add_argument("--limit", type=int, help="the first so many prompts (default: all)")
    samples = ", ".join(f"{kind} {count}" for kind, count in SAMPLES.items())
    parser.add_argument("--samples", type=int, help=f"images for each prompt (default: {samples})")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5, upstream's)")
    parser.add_argument("--size", type=parse_size, help="N or WxH in pixels (default: the checkpoint's)")
    parser.add_argument("--workers", type=int, default=1, help="processes with an engine each, or connections of --url")
    parser.add_argument("--cards", default="", help="GPUs by number, separated by commas, one for each worker in turn")
    source = parser.add_argument_group("who makes them")
    source.add_argument("--url", help="a running server, or the router of a cluster")
    source.add_argument("--api-key-file", type=Path, help="of --url, where it wants a key")
    source.add_argument("--model", help="checkpoint folder or hub id, in this process")
    source.add_argument("--engine", help="folder of build_engine.py, beside --model")
    source.add_argument("--backend", default="auto")
    source.add_argument("--precision")
    source.add_argument("--device", choices=("cpu", "cuda"))
    source.add_argument("--decoder", help="another autoencoder with the same latents")
    source.add_argument("--schedule", default="paper", choices=get_args(Schedule), help="of angles (default paper)")
    source.add_argument("--max-batch", type=int, default=8)
    options = parser.options(argv)
    if (options.url is None) == (options.model is None):
        parser.error("needed is either --model or --url")
    if options.workers < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--workers and --limit: needed is 1 at least")
    return options


@contextmanager
def makers(options: argparse.Namespace) -> Iterator[list[Maker]]:
    """Yields --workers makers, which load at the same time, and closes them at the end."""
    sampling = SamplingOptions(options.steps, options.guidance, options.size)
    with ExitStack() as stack:
        opened: list[Maker] = []

        def add(maker: Maker) -> None:
            opened.append(maker)
            stack.callback(maker.close)

        if options.url is not None:
            key = None if options.api_key_file is None else _api_key(options.api_key_file)
            for _ in range(options.workers):
                add(HttpMaker(options.url, sampling, key))
        elif options.workers == 1 and not options.cards:
            add(EngineMaker(options.model, sampling, **_engine_options(options)))
        else:
            cards = [card for card in options.cards.split(",") if card]
            cores = max(1, len(os.sched_getaffinity(0)) // options.workers)
            for number in range(options.workers):
                environment = {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if cards else {}
                threads = None if cards else cores
                add(ProcessMaker(options.model, sampling, environment, threads, **_engine_options(options)))
        yield opened


def _engine_options(options: argparse.Namespace) -> Mapping[str, Any]:
    names = ("backend", "precision", "device", "decoder", "schedule", "max_batch")
    return {"engine_dir": options.engine, **{name: getattr(options, name) for name in names}}


def _api_key(path: Path) -> str:
    """Returns the first key of the server's key file. Raises BenchError."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise BenchError(f"api-key-file: cannot read {path}: {error.strerror or error}") from error
    if not lines:
        raise BenchError(f"api-key-file: {path} holds no key")
    return lines[0]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document."""
    prompts = read_prompt_set(options.prompts, options.kind, options.limit)
    with makers(options) as opened, tqdm(unit="file", file=sys.stderr) as bar:
        bar.total = len(prompts.entries) * (options.samples or SAMPLES[prompts.kind])
        bar.total //= (options.samples or SAMPLES[prompts.kind]) if prompts.kind == "dpg" else 1
        result = make_images(
            *(prompts, opened, SamplingOptions(options.steps, options.guidance, options.size), options.out),
            samples=options.samples,
            seed=options.seed,
            progress=bar.update,
        )
    return {"program": "bench.quality.images", "command": options.command, **result, "machine": host_facts()}


def show(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    names = ("files", "made_now", "missing", "twice", "prompts_truncated", "seconds", "digest")
    return table(("", ""), [(name.replace("_", " "), result[name]) for name in names])


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: result["missing"] or result["twice"])


if __name__ == "__main__":
    sys.exit(main())
