"""Writes docs/figures/bench.md and quality.md from the JSON documents in bench/results.

    python -m bench.latency --model models/tiny --vs diffusers | tail -1 > bench/results/latency-tiny.json
    python -m bench.report

A result file holds the last line that a bench program printed. The page contains nothing but those files, and the same
files always make the same page.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.acceptance import report as accept
from bench.harness.cli import BenchmarkParser
from bench.harness.errors import BenchError
from bench.harness.summary import STAGES, table
from bench.harness.svg_chart import Bar, stacked_bars
from bench.latency.headline import Headline, read_headline
from bench.peers import comparison as peers
from bench.quality import fp8
from bench.quality.page import page as quality_page
from bench.roofline import projection as roofline
from engines.errors import SprintError

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]

NO_GPU = "Nothing here was measured on a GPU. What concerns GPUs is a projection and says so in every line."
ELSEWHERE = (
    "The tables below were measured on CPUs, or are projections that say so in every line. What was measured on an "
    "H100 is in the first table, in the [log](../../bench/LOG.md) and in `bench/results/h100-2026-11-27.jsonl`."
)
CAVEATS = (
    "Figures hold for the machine named beside them, in the last section; ratios travel better than times.",
    "Random weights (`random:...`) have the published size and cost the same time. Their images are noise, and "
    "distances between them are no statement about quality.",
    "Ours and theirs run in turn in one process on the same tensors, every run with prompts that no cache has seen.",
    "Load is generated on the same machine that serves, and takes its share of it.",
)


def read_results(folder: Path) -> dict[str, Result]:
    """Returns the results by file name without suffix. Raises BenchError for a file that is no result."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BenchError(
                f"{path}: not JSON ({error}); needed is the last line that a bench program printed"
            ) from error
        program = result.get("program") if isinstance(result, dict) else None
        if program not in SECTIONS:
            raise BenchError(f"{path}: of program {program!r}, needed is one of {', '.join(SECTIONS)}")
        found[path.stem] = result
    return found


def _latency(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    head = ("model", "size", "steps", "batch", "ours", "rival", "ours, s", "rival, s", "ratio", *STAGES, "over HTTP, s")
    distance_head = (
        "model",
        "size",
        "who",
        "PSNR to fp32, dB",
        "max abs",
        "PSNR to each other, dB",
        "peak, MiB",
        "tokens",
    )
    times, distances, bars = [], [], []
    for result in results.values():
        ours, theirs = result["ours"], result.get("theirs")
        label = f"{result['model']}, {_by(result['size'])}, {result['steps']} steps, batch {result['batch']}"
        shape = [result["model"], _by(result["size"])]
        ratios = result.get("ratios", {})
        http = result.get("http_seconds", {}).get("total", {}).get("p50")
        times.append(
            [
                *shape,
                result["steps"],
                result["batch"],
                _ran(ours),
                theirs and f"{result['vs']}, {theirs['precision']}",
                _time(ours, "total"),
                theirs and _time(theirs, "total"),
                result.get("ratio"),
                *(ratios.get(stage) for stage in STAGES),
                http,
            ]
        )
        for who, item in (("ours", ours), ("rival", theirs)):
            if item:
                parity = item["parity_to_fp32"] or {}
                peak = result.get("peak_bytes", {}).get("ours" if item is ours else "theirs")
                each = result.get("parity_to_each_other", {}).get("psnr_db")
                distance_cells = (parity.get("psnr_db"), parity.get("max_abs"), each)
                tokens = result["prompt_tokens"]["mean"]
                distances.append([*shape, f"{who}: {_ran(item)}", *distance_cells, peak and peak / 2**20, tokens])
                bars.append(Bar(f"{label}: {_ran(item)}", {stage: item["seconds"][stage]["p50"] for stage in STAGES}))
    text = (
        "Medians in seconds from prompts to pixels; `ratio` is the rival's over ours, end to end and by stage.\n\n"
        f"{table(head, times)}\n\nHow far from fp32 on equally rounded weights, and from each other:\n\n"
        f"{table(distance_head, distances)}\n\n![Seconds by stage](bench-latency.svg)"
    )
    return text, {"bench-latency.svg": stacked_bars("From prompts to pixels", "s", bars)}


def _load(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    head = [
        *("checkpoint", "backend", "load", "answers/s", "in time/s", "deadline, ms", "p50, ms", "p95, ms", "p99, ms"),
        *(
            "overhead p50, ms",
            "overhead p99, ms",
            "size",
            "engine p50, ms",
            "encode p50, ms",
            "batch",
            "refused",
            "lost",
            "wrong of checked",
            "memory growth",
        ),
    ]
    rows = []
    for result in results.values():
        engine, latency, check = result["engine"], result["latency_ms"], result["check"]
        closed = result["loop"] == "closed"
        refused = sum(count for status, count in result["statuses"].items() if status != "200")
        rows.append(
            [
                engine["checkpoint"],
                engine["backend"],
                f"{result['concurrency']} clients" if closed else f"{result['rate']:g}/s",
                *(result[key] for key in ("throughput", "goodput", "deadline_ms")),
                *(latency[key] for key in ("p50", "p95", "p99")),
                *(result["overhead_ms"][key] for key in ("p50", "p99")),
                f"{_by(result['size'])} {result['format']}",
                sum(result["stages_ms"][stage]["p50"] for stage in STAGES),
                result["stages_ms"]["encode"]["p50"],
                result["batch"]["mean_size"],
                refused,
                result["lost"],
                f"{check['wrong']} of {check['checked']} ({check['kind']})",
                f"{result['memory_bytes']['growth']:.2%}",
            ]
        )
    return (
        "Over HTTP; `in time` means within the deadline. Overhead is the time of an answer beyond the engine's own "
        "stages, so with more than one client it holds the wait for others. Engine is the sum of its stages, for the "
        "whole batch. Encode is the time from pixels to a file, the wait for a codec thread included. The engine's "
        "thread is at its next batch meanwhile: `tests/server/generation/test_delivery.py` stops all encoders and "
        "sees batch after batch run.\n\n" + table(head, rows)
    ), {}


def _quality(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    facts = (
        "Scores, distances and latency by precision, steps and start angle, with intervals: [quality.md](quality.md)."
    )
    return facts, {"quality.md": quality_page(results)}


def _roofline(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    parts, plots = [], {}
    for name, result in results.items():
        plots[f"bench-{name}.svg"] = roofline.plot(result)
        parts.append(f"{roofline.show(result)}\n\n![Projection, not measured](bench-{name}.svg)")
    return "\n\n".join(parts), plots


def _peers(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    facts = (
        "The same engine, PNG encoder and batch limit (8) behind each server, one server at a time under one load "
        "generator. `fake:5` takes 5 ms a batch, whatever its size; clients are closed loops, rates open ones."
    )
    parts = []
    for result in results.values():
        known = {peer: version for peer, version in result["versions"].items() if version}  # ours is no package
        releases = [f"{peer} {version}" for peer, version in known.items()]
        parts.append(f"{peers.show(result)}\n\nReleases: {', '.join(releases)}.")
    return "\n\n".join([facts, *parts]), {}


def _acceptance(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    pages = (accept.show(result).removeprefix("# ") for result in results.values())
    return "\n\n".join(f"### {page}" for page in pages), {}


def _fp8(results: Mapping[str, Result]) -> tuple[str, dict[str, str]]:
    return "\n\n".join(fp8.show(result) for result in results.values()), {}


Section = Callable[[Mapping[str, Result]], tuple[str, dict[str, str]]]
SECTIONS: Mapping[str, tuple[str, Section]] = {
    "bench.acceptance": ("Acceptance on a device", _acceptance),
    "bench.latency": ("Latency against diffusers", _latency),
    "bench.load": ("Under load", _load),
    "bench.peers": ("Beside other servers", _peers),
    "bench.quality": ("Quality", _quality),
    "bench.quality.fp8": ("What fp8 costs, rounded in PyTorch", _fp8),
    "bench.roofline": ("Projections for GPUs", _roofline),
}


def _time(subject: Result, stage: str) -> float:
    return float(subject["seconds"][stage]["p50"])


def _ran(subject: Result) -> str:
    return f"{subject['backend']}, {subject['precision']}"


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def render(results: Mapping[str, Result], headline: Headline | None = None) -> dict[str, str]:
    """Returns bench.md and its plots: text by file name. The headline is the five figures on top."""
    lines = [
        "# Benchmarks",
        "",
        "For readers who want figures: first the five that matter, then every table, folded.",
        "`python -m bench.report` writes this page from `bench/results/`.",
        "",
    ]
    files: dict[str, str] = {}
    if headline:
        files |= headline.plots()
        lines += ["## Five figures", "", headline.page(), ""]
    lines += ["## Caveats", ""]
    on_gpu = any("cuda" in str(item.get("device", item.get("engine"))) for item in results.values())
    lines += [f"- {caveat}" for caveat in (CAVEATS if on_gpu else (ELSEWHERE if headline else NO_GPU, *CAVEATS))]
    busy = [name for name, item in results.items() if _busy(item) and item["program"] != "bench.roofline"]
    if busy:
        lines.append(
            f"- The machine had other work during {', '.join(busy)}: times are too long, ratios roughly right."
        )
    for program, (title, section) in SECTIONS.items():
        own_results = {name: result for name, result in results.items() if result["program"] == program}
        if own_results:
            text, plots = section(own_results)
            files |= plots
            lines += ["", f"## {title}", "", *_folded(text, len(own_results))]
    lines += ["", "## Reproduction", "", "<details><summary>The command and the machine of each file</summary>", ""]
    for name, result in results.items():
        facts = result["machine"]
        lines += [
            f"### {name}",
            "",
            f"    {result['command']} | tail -1 > bench/results/{name}.json",
            "",
            f"{facts['date']}, revision {facts['revision']}, {facts['cores']} cores of {facts['cpu']}, "
            f"{facts['memory_gib']} GiB, Python {facts['python']}, torch {facts['torch']}, load average "
            f"{facts['load_average']} at the end.",
            "",
        ]
    lines += ["</details>"]
    return {"bench.md": "\n".join(lines).rstrip() + "\n", **files}


def _folded(text: str, results: int) -> list[str]:
    """Returns the lines of a section that a reader opens; one without a table stays open."""
    if "\n|" not in text:
        return [text]
    files = "1 file" if results == 1 else f"{results} files"
    return [f"<details><summary>Tables of {files}</summary>", "", text, "", "</details>"]


def _busy(result: Result) -> bool:
    facts, timed = result["machine"], result.get("latency_runs") != 0
    return bool(timed and facts["load_average"] > facts["cores"] + 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.report", __doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="a folder (default docs/figures)")
    options = parser.options(argv)
    try:
        results = read_results(options.results)
        if not results:
            raise BenchError(f"{options.results}: no results; see python -m bench.report --help")
        files = render(results, read_headline(options.results, results))
    except SprintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    for name, text in files.items():
        (options.out / name).write_text(text, encoding="utf-8")
        print(options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
