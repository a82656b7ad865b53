"""Computes GenEval's score, with intervals, from the results of its evaluator.

    git clone https://github.com/djghosh13/geneval
    python geneval/evaluation/evaluate_images.py runs/geneval/images --outfile results.jsonl --model-path <detectors>
    python -m bench.quality.geneval results.jsonl --images runs/geneval

The evaluator needs a separate environment and a GPU (its README: mmdet 2, mmcv, open_clip, clip_benchmark); this
program reads its output. overall is the mean of the tags' scores, as in its summary_scores.py. Prints a table, then one
JSON document as the last line. Exit code 1: images are missing from the results.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.summary import table
from bench.quality.images.folder import ImageFolder
from bench.quality.intervals import grouped_interval, mean_interval


def read_results(path: Path) -> dict[str, dict[str, list[float]]]:
    """Returns tag -> prompt's metadata -> 0 or 1 of each image. Raises BenchError for other files."""
    result: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            result[entry["tag"]][entry["metadata"]].append(float(entry["correct"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: {error!r}; needed is what GenEval's evaluate_images.py writes") from error
    if not result:
        raise BenchError(f"{path}: holds no results")
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document."""
    results = read_results(options.results)
    prompts = {tag: [fmean(values) for values in result.values()] for tag, result in results.items()}
    tags = {tag: fmean(value for values in result.values() for value in values) for tag, result in results.items()}
    images = sum(len(values) for result in results.values() for values in result.values())
    folder = None if options.images is None else ImageFolder(options.images).manifest()
    missing = 0 if folder is None else int(folder["identity"]["files"]) - images
    interval = grouped_interval(prompts)
    return {
        "program": "bench.quality.geneval",
        "command": options.command,
        "images": images,
        "missing": missing,
        "prompts": sum(map(len, prompts.values())),
        "tags": {tag: round(value, 4) for tag, value in tags.items()},
        "intervals": {tag: list(mean_interval(values))[1:] for tag, values in prompts.items()},
        "overall": round(fmean(tags.values()), 5),
        "interval": [interval.low, interval.high],
        "manifest": folder,
    }


def show(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    rows = [[tag, value, *result["intervals"][tag]] for tag, value in result["tags"].items()]
    rows.append(["overall", result["overall"], *result["interval"]])
    return f"{result['images']} images, {result['missing']} missing\n\n{table(('tag', 'score', 'low', 'high'), rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.quality.geneval", __doc__)
    parser.add_argument("results", type=Path, help="what evaluate_images.py wrote")
    parser.add_argument("--images", type=Path, help="folder of bench.quality.images: are all of them judged?")
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: result["missing"])


if __name__ == "__main__":
    sys.exit(main())
