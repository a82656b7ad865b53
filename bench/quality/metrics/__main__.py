"""Computes metrics of a folder of images with the networks of the published figures.

    python -m bench.quality.metrics runs/mjhq --metrics fid,clip,cmmd,hps --reference MJHQ-30K/images --download
    python -m bench.quality.metrics runs/mjhq --metrics fid --reference mjhq-1024.npz --size 1024 --weights weights/
    python -m bench.quality.metrics runs/tiny --metrics judge

fid needs the extra `fid`; clip, cmmd and hps need the extra `clip`. Weights are read from --weights, or from the caches
of torch and the hub; --download fetches missing ones. Each figure has the sha256 of its weights. An unavailable metric
is reported with its reason and does not stop the others. Prints a table, then one JSON document as the last line. Exit
code 1: a metric is missing.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.cli import BenchmarkParser, comma_list, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.summary import table
from bench.quality.images.folder import ImageFolder
from bench.quality.metrics import clip
from bench.quality.metrics.image_items import ImageItem, read_images
from bench.quality.metrics.inception import INCEPTION, Inception
from bench.quality.metrics.measures import clip_score, cmmd, fid, hps, judge_score
from bench.quality.metrics.weights import UnavailableError, WeightLocations
from distill.evaluation.intervals import Interval


def _fid(items: Sequence[ImageItem], options: argparse.Namespace) -> dict[str, Any]:
    weights = options.locations.find("fid", INCEPTION)
    network = Inception(weights.path, options.device)
    value = fid(items, _reference(options, "fid"), network, options.size, options.keep_statistics)
    return {"value": round(value, 4), "size": options.size, "weights": weights.to_dict()}


def _clip(items: Sequence[ImageItem], options: argparse.Namespace) -> dict[str, Any]:
    return _scored(items, options, "clip", clip.SMALL if options.clip == "ViT-B-32" else clip.SCORE, clip_score)


def _hps(items: Sequence[ImageItem], options: argparse.Namespace) -> dict[str, Any]:
    return _scored(items, options, "hps", clip.HPS, hps)


def _scored(
    items: Sequence[ImageItem],
    options: argparse.Namespace,
    name: str,
    architecture: clip.Architecture,
    score: Callable[[Sequence[ImageItem], clip.ImageText], Interval],
) -> dict[str, Any]:
    weights = options.locations.find(name, architecture.weights)
    results = score(items, clip.OpenClip(architecture, weights, options.device))
    figures = {"value": round(results.mean, 4), "interval": [round(results.low, 4), round(results.high, 4)]}
    return figures | {"network": architecture.name, "weights": weights.to_dict()}


def _cmmd(items: Sequence[ImageItem], options: argparse.Namespace) -> dict[str, Any]:
    weights = options.locations.find("cmmd", clip.CMMD.weights)
    network = clip.OpenClip(clip.CMMD, weights, options.device)
    value = cmmd(items, _reference(options, "cmmd"), network)
    return {"value": round(value, 4), "network": clip.CMMD.name, "weights": weights.to_dict()}


def _judge(items: Sequence[ImageItem], _: argparse.Namespace) -> dict[str, Any]:
    return judge_score(items)


Metric = Callable[[Sequence[ImageItem], argparse.Namespace], dict[str, Any]]
METRICS: Mapping[str, Metric] = {"fid": _fid, "clip": _clip, "cmmd": _cmmd, "hps": _hps, "judge": _judge}


def _reference(options: argparse.Namespace, metric: str) -> Path:
    if options.reference is None:
        raise BenchError(f"{metric}: compares with other images; name their folder with --reference")
    reference: Path = options.reference
    return reference


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document."""
    items = read_images(options.images)
    results: dict[str, dict[str, Any]] = {}
    for name in options.metrics:
        print(f"{name} of {len(items)} images", file=sys.stderr, flush=True)
        try:
            results[name] = METRICS[name](items, options)
        except UnavailableError as error:
            results[name] = {"value": None, "unavailable": str(error)}
    manifest = (options.images / "manifest.json").is_file()
    return {
        "program": "bench.quality.metrics",
        "command": options.command,
        "images": len(items),
        "reference": None if options.reference is None else options.reference.name,
        "manifest": ImageFolder(options.images).manifest() if manifest else None,
        "metrics": results,
        "machine": host_facts(),
    }


def show(results: dict[str, Any]) -> str:
    """Returns the table for people, and a line for each missing metric."""
    rows = [
        [name, entry["value"], _by(entry), f"{results['images']} images"] for name, entry in results["metrics"].items()
    ]
    missing = [entry["unavailable"] for entry in results["metrics"].values() if "unavailable" in entry]
    return "\n".join([table(("metric", "value", "by", "of"), rows), *missing])


def _by(entry: Mapping[str, Any]) -> str | None:
    """Describes interval, categories, and whether the weights are the published ones."""
    parts = [f"95 %: {entry['interval'][0]} to {entry['interval'][1]}"] if "interval" in entry else []
    parts += [f"{name} {value}" for name, value in entry.get("categories", {}).items()]
    if "weights" in entry:
        parts.append(f"{entry['weights']['file']}, sha256 {entry['weights']['sha256'][:8]}")
        if entry["weights"]["published"] is False:
            parts.append("NOT the published weights")
    return ", ".join(parts) or None


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = BenchmarkParser("bench.quality.metrics", __doc__)
    parser.add_argument("images", type=Path, help="folder of bench.quality.images, or any folder of images")
    parser.add_argument("--metrics", type=comma_list(str, METRICS), required=True, help=f"of {', '.join(METRICS)}")
    parser.add_argument("--reference", type=Path, help="folder of real images; for fid also an .npz of pytorch-fid")
    parser.add_argument("--keep-statistics", type=Path, help="write the reference's for the next time (.npz)")
    parser.add_argument(
        "--size", type=int, default=512, help="both sets are cut to it for fid (default 512, upstream's)"
    )
    parser.add_argument(
        "--clip", default="ViT-L-14", choices=("ViT-L-14", "ViT-B-32"), help="network (default upstream's)"
    )
    parser.add_argument("--weights", type=Path, help="folder of weights (default: the caches of torch and the hub)")
    parser.add_argument("--download", action="store_true", help="fetch weights that are absent")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default cpu)")
    options = parser.options(argv)
    options.locations = WeightLocations(options.weights, options.download)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(
        lambda: measure(options),
        show,
        lambda results: any("unavailable" in entry for entry in results["metrics"].values()),
    )


if __name__ == "__main__":
    sys.exit(main())
