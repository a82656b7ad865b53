"""Batch times of a card: measured, projected, or the fake engine's fixed delay."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.errors import BenchError
from engines.types import BatchKey, powers_of_two, smallest_fitting

MEASURED = re.compile(r"ours (?P<precision>bf16|fp8) batch (?P<batch>\d+) steps (?P<steps>\d+)")


@dataclass(frozen=True, slots=True)
class BatchSeconds:
    """Seconds until the first image is decoded, and of each image: they are returned one by one."""

    before: float
    each: float


@dataclass(frozen=True)
class Stages:
    """Stage times. `batches`: by (width, height, steps) and bucket. `encode_s`: of a file on a codec thread.

    `http_s`: the rest of a single request. `ready_s`: from process start until warm.
    """

    source: str
    batches: Mapping[tuple[int, int, int], Mapping[int, BatchSeconds]]
    encode_s: float = 0.0
    http_s: float = 0.0
    ready_s: float = 0.0

    def table(self, max_batch: int, keys: Iterable[BatchKey]) -> dict[BatchKey, list[BatchSeconds]]:
        """Returns the seconds of a batch by key and number of jobs; index 0 is unused.

        Raises BenchError if a bucket was not measured.
        """
        found: dict[BatchKey, list[BatchSeconds]] = {}
        buckets = powers_of_two(max_batch)
        for key in keys:
            bucket_seconds = self.batches.get((key.width, key.height, key.steps), {})
            missing = [bucket for bucket in buckets if bucket not in bucket_seconds]
            if missing:
                raise BenchError(
                    f"{self.source}: no times of {key.width}x{key.height}, {key.steps} steps at a batch of "
                    f"{missing[0]}; there are {self._known()}"
                )
            found[key] = [bucket_seconds[smallest_fitting(max(jobs, 1), buckets)] for jobs in range(max_batch + 1)]
        return found

    def _known(self) -> str:
        return "; ".join(
            f"{w}x{h}, {s} steps: {', '.join(map(str, sorted(b)))}" for (w, h, s), b in self.batches.items()
        )


class AnyShape(dict[tuple[int, int, int], Mapping[int, BatchSeconds]]):
    """The fake engine's times: the same for every size, with all images returned at the end."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._each = {bucket: BatchSeconds(seconds, 0.0) for bucket in range(1, 65)}

    def get(self, _key: object, _default: object = None) -> Any:
        return self._each


def load_stages(text: str, precision: str = "bf16", http_ms: float | None = None) -> Stages:
    """Loads stage times from `fake:MS`, a .jsonl measured on a card, or a .json as `from_rows` reads it.

    `http_ms` overrides the measured value. Raises BenchError.
    """
    kind, _, ms = text.partition(":")
    if kind == "fake":
        try:
            return Stages(text, AnyShape(float(ms) / 1000), http_s=(http_ms or 0.0) / 1000)
        except ValueError as error:
            raise BenchError(f"--stages: got {text!r}, needed is a file or fake:MS, such as fake:20") from error
    path = Path(text)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BenchError(f"--stages: {text}: {error}") from error
    found = from_measurement(path.name, lines, precision) if "about" in lines[0] else from_rows(path.name, lines[0])
    return (
        found if http_ms is None else Stages(found.source, found.batches, found.encode_s, http_ms / 1000, found.ready_s)
    )


def from_measurement(name: str, lines: list[dict[str, Any]], precision: str) -> Stages:
    """Takes 1024x1024 times from a card's figures: bf16 batches, JPEG on the card, HTTP's share.

    fp8 was measured over HTTP and in the decoder: its batches are a projection, those of bf16 with the fp8 decoder.
    """
    by_name = {line["name"]: line for line in lines if "name" in line}
    batches: dict[tuple[int, int, int], dict[int, BatchSeconds]] = {}
    for label, line in by_name.items():
        if (match := MEASURED.fullmatch(label)) and match["precision"] == "bf16":
            batch, each = int(match["batch"]), line["decode"]["p50"]
            before = line["total"]["p50"] - batch * each
            if precision == "fp8":
                each -= by_name["decoder fp8=False"]["graph"]["p50"] - by_name["decoder fp8=True"]["graph"]["p50"]
            batches.setdefault((1024, 1024, int(match["steps"])), {})[batch] = BatchSeconds(before / 1000, each / 1000)
    alone = by_name[f"http alone jpeg {precision}"]["p50"] / 1000
    first = batches[1024, 1024, 1][1]
    source = f"{name}, {precision}: {lines[0]['about']}"
    ready_s = by_name[f"server ready {precision}"]["s"]
    return Stages(source, batches, http_s=max(alone - first.before - first.each, 0.0), ready_s=ready_s)


def from_rows(name: str, document: dict[str, Any]) -> Stages:
    """Reads {"source", "rows": [{"width", "height", "steps", "batch", "before_ms", "each_ms"}], "encode_ms", "http_ms",
    "ready_s"}, from a hand-written file or bench.budget's projection. Raises BenchError."""
    try:
        batches: dict[tuple[int, int, int], dict[int, BatchSeconds]] = {}
        for row in document["rows"]:
            seconds = BatchSeconds(row["before_ms"] / 1000, row["each_ms"] / 1000)
            batches.setdefault((row["width"], row["height"], row["steps"]), {})[row["batch"]] = seconds
        times = [document.get(field, 0.0) for field in ("encode_ms", "http_ms")]
        encode_s, http_s = (ms / 1000 for ms in times)
        return Stages(f"{name}: {document['source']}", batches, encode_s, http_s, document.get("ready_s", 0.0))
    except (KeyError, TypeError) as error:
        raise BenchError(f"--stages: {name}: {error!r}; see bench/fleet/stages.py for what is read") from error
