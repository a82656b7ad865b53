"""Metrics of a folder of images, by the networks that published figures are measured with.

    python -m bench.quality.metrics runs/mjhq --metrics fid,clip,cmmd,hps --reference MJHQ-30K/images --download
    python -m bench.quality.metrics runs/mjhq --metrics fid --reference mjhq-1024.npz --size 1024 --weights weights/
    python -m bench.quality.metrics runs/tiny --metrics judge

fid needs the extra `fid`; clip, cmmd and hps need the extra `clip`. Weights lie in --weights, or in the caches of torch
and the hub; --download fetches what is absent. Their sha256 stands beside each figure. A metric that cannot be taken
says why, and the others are taken. Prints a table, then one JSON document as the last line. Exit code 1: one of the
metrics is missing.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.cli import command, told
from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.harness.summary import table
from bench.quality.images.folder import ImageFolder
from bench.quality.intervals import Interval
from bench.quality.metrics import clip
from bench.quality.metrics.inception import INCEPTION, Inception
from bench.quality.metrics.measures import clip_score, cmmd, fid, hps, judged
from bench.quality.metrics.shown import Shown, read_shown
from bench.quality.metrics.weights import UnavailableError, WeightPlaces


def _fid(shown: Sequence[Shown], options: argparse.Namespace) -> dict[str, Any]:
    weights = options.places.find("fid", INCEPTION)
    network = Inception(weights.path, options.device)
    value = fid(shown, _reference(options, "fid"), network, options.size, options.keep_statistics)
    return {"value": round(value, 4), "size": options.size, "weights": weights.to_dict()}


def _clip(shown: Sequence[Shown], options: argparse.Namespace) -> dict[str, Any]:
    return _scored(shown, options, "clip", clip.SMALL if options.clip == "ViT-B-32" else clip.SCORE, clip_score)


def _hps(shown: Sequence[Shown], options: argparse.Namespace) -> dict[str, Any]:
    return _scored(shown, options, "hps", clip.HPS, hps)


def _scored(
    shown: Sequence[Shown],
    options: argparse.Namespace,
    name: str,
    architecture: clip.Architecture,
    score: Callable[[Sequence[Shown], clip.ImageText], Interval],
) -> dict[str, Any]:
    weights = options.places.find(name, architecture.weights)
    found = score(shown, clip.OpenClip(architecture, weights, options.device))
    told = {"value": round(found.mean, 4), "interval": [round(found.low, 4), round(found.high, 4)]}
    return told | {"network": architecture.name, "weights": weights.to_dict()}


def _cmmd(shown: Sequence[Shown], options: argparse.Namespace) -> dict[str, Any]:
    weights = options.places.find("cmmd", clip.CMMD.weights)
    network = clip.OpenClip(clip.CMMD, weights, options.device)
    value = cmmd(shown, _reference(options, "cmmd"), network)
    return {"value": round(value, 4), "network": clip.CMMD.name, "weights": weights.to_dict()}


def _judge(shown: Sequence[Shown], _: argparse.Namespace) -> dict[str, Any]:
    return judged(shown)


Metric = Callable[[Sequence[Shown], argparse.Namespace], dict[str, Any]]
METRICS: Mapping[str, Metric] = {"fid": _fid, "clip": _clip, "cmmd": _cmmd, "hps": _hps, "judge": _judge}


def _reference(options: argparse.Namespace, metric: str) -> Path:
    if options.reference is None:
        raise BenchError(f"{metric}: compares with other images; name their folder with --reference")
    reference: Path = options.reference
    return reference


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON document."""
    shown = read_shown(options.images)
    found: dict[str, dict[str, Any]] = {}
    for name in options.metrics:
        print(f"{name} of {len(shown)} images", file=sys.stderr, flush=True)
        try:
            found[name] = METRICS[name](shown, options)
        except UnavailableError as error:
            found[name] = {"value": None, "unavailable": str(error)}
    manifest = (options.images / "manifest.json").is_file()
    return {
        "program": "bench.quality.metrics",
        "command": options.command,
        "images": len(shown),
        "reference": None if options.reference is None else options.reference.name,
        "manifest": ImageFolder(options.images).manifest() if manifest else None,
        "metrics": found,
        "machine": machine(),
    }


def show(found: dict[str, Any]) -> str:
    """The table for people, and a line for each metric that is missing."""
    rows = [[name, one["value"], _by(one), f"{found['images']} images"] for name, one in found["metrics"].items()]
    missing = [one["unavailable"] for one in found["metrics"].values() if "unavailable" in one]
    return "\n".join([table(("metric", "value", "by", "of"), rows), *missing])


def _by(one: Mapping[str, Any]) -> str | None:
    """Interval, categories, and whether the weights are the published ones."""
    parts = [f"95 %: {one['interval'][0]} to {one['interval'][1]}"] if "interval" in one else []
    parts += [f"{name} {value}" for name, value in one.get("categories", {}).items()]
    if "weights" in one:
        parts.append(f"{one['weights']['file']}, sha256 {one['weights']['sha256'][:8]}")
        if one["weights"]["published"] is False:
            parts.append("NOT the published weights")
    return ", ".join(parts) or None


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= METRICS.keys():
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {', '.join(METRICS)}")
    return names


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, help="folder of bench.quality.images, or any folder of images")
    parser.add_argument("--metrics", type=_names, required=True, help=f"of {', '.join(METRICS)}, separated by commas")
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
    options = parser.parse_args(argv)
    options.places = WeightPlaces(options.weights, options.download)
    options.command = command("bench.quality.metrics", argv)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(sys.argv[1:] if argv is None else argv)
    return told(
        lambda: measure(options),
        show,
        lambda found: any("unavailable" in one for one in found["metrics"].values()),
    )


if __name__ == "__main__":
    sys.exit(main())
