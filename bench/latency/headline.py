"""The five figures that matter, and two plots, from files of bench/results: an H100's, a CPU's, the peers'.

`python -m bench.report` writes them to the top of docs/figures/bench.md. Every figure here was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.errors import BenchError
from bench.harness.summary import table
from bench.harness.svg_chart import Group, Interval, grouped_intervals

Result = Mapping[str, Any]

CARD, CARD_DIFFUSERS = "h100-2026-11-27.jsonl", "h100-diffusers-2026-11-27.jsonl"
CPU_INT8, CPU_BF16, PEERS, ALONE = "latency-random-1024-int8", "latency-random-1024", "peers-fake", "load-fake-1"
LOADS = ("1 clients", "8 clients", "64 clients")
NOTE = "27 November 2026, medians, different runs; eager up to 30 % too slow (busy host)"
AGAINST, SERVERS = "bench-diffusers.svg", "bench-servers.svg"


@dataclass(frozen=True)
class Headline:
    """Rows of the card's files by name, and the results of the CPU by file name."""

    card: Mapping[str, Result]
    diffusers: Mapping[str, Result]
    results: Mapping[str, Result]

    def page(self) -> str:
        """Returns Markdown: a table of five figures and the two plots."""
        rows = [
            ("one image on an H100, over HTTP, p50", *self._over_http()),
            ("one image on an H100, in the engine", *self._in_engine()),
            ("images a second on an H100, 32 clients", *self._throughput()),
            ("one image on two CPU cores", *self._on_cpu()),
            ("images a second over HTTP, 64 clients, an engine of 5 ms", *self._beside_servers()),
        ]
        alone = self._rates(LOADS[0])
        return (
            f"{table(('figure', 'ours', 'beside it'), rows)}\n\n"
            "All five were measured; projections stand in a section of their own. The first four are of "
            "`random:sprint-0.6b` at 1024x1024 with one step: the published size with random weights.\n\n"
            "On the H100, ours and diffusers ran on the same day, in different runs. Other processes compiled on the "
            "host then, so eager diffusers may be up to 30 % too slow there.\n\n"
            f"On an engine of 6 ms, the server adds {self._overhead():.2g} ms to a request alone (p50). With one "
            f"client it makes {alone['ours']:.0f} images a second, plain FastAPI {alone['fastapi']:.0f}.\n\n"
            f"![Seconds to an image, beside diffusers]({AGAINST})\n\n"
            f"![Images a second, beside other servers]({SERVERS})"
        )

    def plots(self) -> dict[str, str]:
        """Returns file name -> SVG."""
        return {AGAINST: self._against_diffusers(), SERVERS: self._against_servers()}

    def _total(self, name: str) -> tuple[float, float]:
        low, high = self.diffusers[name]["total"]
        return low, high

    def _engine_ms(self) -> float:
        return float(self.card["ours bf16 batch 1 steps 1"]["total"]["p50"])

    def _over_http(self) -> tuple[str, None]:
        bf16, fp8 = (self.card[f"http alone jpeg {precision}"]["p50"] for precision in ("bf16", "fp8"))
        return f"{bf16:.1f} ms in bf16, {fp8:.1f} ms in fp8 (JPEG)", None

    def _in_engine(self) -> tuple[str, str]:
        ours, parts = self._engine_ms(), []
        for name, label in (("diffusers compiled", "with torch.compile"), ("diffusers eager", "eager")):
            low, high = self._total(name)
            parts.append(f"{low:g} to {high:g} ms {label} ({low / ours:.1f} to {high / ours:.1f} times)")
        return f"{ours:.1f} ms in bf16, a new prompt each", "diffusers 0.42.1: " + ", ".join(parts)

    def _throughput(self) -> tuple[str, None]:
        bf16, fp8 = (self.card[f"http closed loop 32 {precision}"]["per_s"] for precision in ("bf16", "fp8"))
        return f"{bf16:.1f} in bf16, {fp8:.1f} in fp8 (JPEG)", None

    def _on_cpu(self) -> tuple[str, str]:
        int8, bf16 = self.results[CPU_INT8], self.results[CPU_BF16]
        ours = [f"{_seconds(one, 'ours'):.1f} s in {one['ours']['precision']}" for one in (int8, bf16)]
        theirs = [f"{_seconds(one, 'theirs'):.1f} s ({one['ratio']:.1f} times)" for one in (int8, bf16)]
        return ", ".join(ours), f"diffusers in bf16, in turn: {' and '.join(theirs)}"

    def _beside_servers(self) -> tuple[str, str]:
        rates = self._rates(LOADS[-1])
        others = [f"{peer} {rate:.0f}" for peer, rate in rates.items() if peer != "ours"]
        return f"{rates['ours']:.0f}", ", ".join(others)

    def _overhead(self) -> float:
        return float(self.results[ALONE]["overhead_ms"]["p50"])

    def _rates(self, load: str) -> dict[str, float]:
        return {row["peer"]: row["throughput"] for row in self._rows(load)}

    def _rows(self, load: str) -> list[Result]:
        return [row for row in self.results[PEERS]["rows"] if row["load"] == load]

    def _against_diffusers(self) -> str:
        card = [Interval("ours, bf16", self._engine_ms(), self._engine_ms(), ours=True)]
        for name, label in (("diffusers compiled", "torch.compile"), ("diffusers eager", "eager")):
            card.append(Interval(f"diffusers, {label}, bf16", *self._total(name), ours=False))
        cpu = []
        for name in (CPU_INT8, CPU_BF16):
            result = self.results[name]
            mine, other = _seconds(result, "ours"), _seconds(result, "theirs")
            cpu.append(Interval(f"ours, {result['ours']['precision']}", mine, mine, ours=True))
            cpu.append(Interval("diffusers, eager, bf16, in turn with it", other, other, ours=False))
        machine = self.results[CPU_INT8]["machine"]
        return grouped_intervals(
            "From a prompt to pixels, 0.6B with random weights, 1024x1024, one step: measured",
            [
                Group("NVIDIA H100", "ms", card, NOTE),
                Group(f"{machine['cores']} CPU cores", "s", cpu, f"{machine['cpu']}, {machine['date']}, medians"),
            ],
        )

    def _against_servers(self) -> str:
        machine = self.results[PEERS]["machine"]
        source = f"{machine['cores']} cores of {machine['cpu']}, {machine['date']}, load generator on them too"
        groups = []
        for load in LOADS:
            bars = []
            for row in self._rows(load):
                least, most = row["spread"]["throughput"]
                bars.append(Interval(row["peer"], least, most, ours=row["peer"] == "ours"))
            groups.append(Group(load.replace("1 clients", "1 client"), "images/s", bars, source))
        return grouped_intervals(
            "The same engine (5 ms a batch) and PNG encoder behind each server, batches of up to 8: measured", groups
        )


def read_headline(folder: Path, results: Mapping[str, Result]) -> Headline | None:
    """Returns the headline of a folder of results, or None where one of its files is absent.

    Raises BenchError for a file of the card that is no JSON lines.
    """
    paths = [folder / CARD, folder / CARD_DIFFUSERS]
    if not all(path.is_file() for path in paths) or {CPU_INT8, CPU_BF16, PEERS, ALONE} - set(results):
        return None
    card, diffusers = (_rows(path) for path in paths)
    return Headline(card, diffusers, results)


def _rows(path: Path) -> dict[str, Result]:
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise BenchError(f"{path}: not JSON lines ({error})") from error
    return {row["name"]: row for row in rows if "name" in row}


def _seconds(result: Result, who: str) -> float:
    return float(result[who]["seconds"]["total"]["p50"])
