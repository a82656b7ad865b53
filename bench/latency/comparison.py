"""Runs our engine and a baseline in turn: seconds by stage, peak memory, distances of their images."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator
from bench.harness.memory import peak_bytes, peak_rise
from bench.harness.pipelines import DTYPES, DiffusersPipeline, EnginePipeline, Pipeline, TimedImages, Workload
from bench.harness.server_process import running_server
from bench.harness.subprocess_call import run_in_subprocess
from bench.harness.summary import STAGES, percentiles, table
from bench.latency.openvino_pipeline import OpenVinoPipeline
from bench.latency.shared_weights import SharedWeights
from distill.evaluation.scores import evaluation_prompts
from engines.backends.parity import difference
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.models.instruction import INSTRUCTION
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.types import Pixels

CAPTIONS = 400  # to choose prompts of the wanted length from


@dataclass
class Series:
    """The runs of one pipeline."""

    facts: dict[str, object]
    load_seconds: float
    warmup_seconds: float = 0.0
    runs: list[TimedImages] = field(default_factory=list)
    rises: list[int] = field(default_factory=list)

    def seconds(self, stage: str) -> list[float]:
        return [run.seconds[stage] for run in self.runs]

    def median(self, stage: str) -> float:
        return statistics.median(self.seconds(stage))


class PromptPool:
    """Captions whose own token count, behind the instruction, is nearest to `tokens`; hands each out once."""

    def __init__(self, checkpoint: Checkpoint, tokens: int) -> None:
        settings = checkpoint.settings
        instruction = INSTRUCTION if settings.instruction else ""
        tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
        texts = dict.fromkeys(prompt.text for prompt in evaluation_prompts(CAPTIONS))
        self._lengths = {text: len(tokenizer.encode(text).tokens.ids) - len(tokenizer.prefix) for text in texts}
        self._left = sorted(texts, key=lambda text: abs(self._lengths[text] - tokens))
        self.used: list[int] = []

    def take(self, count: int) -> list[str]:
        """Returns the next `count` prompts. Raises BenchError if too few are left."""
        if count > len(self._left):
            raise BenchError(f"prompts: {len(self._left)} are left, {count} are needed; take fewer --runs or --batch")
        prompts_taken, self._left = self._left[:count], self._left[count:]
        self.used += [self._lengths[text] for text in prompts_taken]
        return prompts_taken


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Runs reference, load, warm-up, the runs in turn and the options; returns the JSON document. Seconds and bytes."""
    device = _device(options)
    checkpoint = open_checkpoint(options.model, options.decoder)
    width, height = options.size or checkpoint.settings.default_size
    prompt_pool = PromptPool(checkpoint, options.tokens)

    def workload(seed: int) -> Workload:
        seeds = [seed * options.batch + i for i in range(options.batch)]
        return Workload(prompt_pool.take(options.batch), seeds, width, height, options.steps)

    first, *rest = (workload(seed) for seed in range(options.runs))
    warmup = workload(options.runs)
    base = DTYPES[options.vs_precision]
    reference = run_in_subprocess(None, _reference, options, first) if options.reference else None
    shared = replace(checkpoint, weights=SharedWeights(checkpoint.weights, base))
    compared: dict[str, Pipeline] = {}
    series: dict[str, Series] = {}
    try:
        for name in ("ours", "theirs") if options.vs else ("ours",):
            began = time.perf_counter()
            compared[name] = _pipeline(name, options, shared, device)
            series[name] = Series(compared[name].facts, time.perf_counter() - began)
            began = time.perf_counter()
            compared[name].run(warmup)
            series[name].warmup_seconds = time.perf_counter() - began
        for number, current in enumerate([first, *rest]):
            for name in sorted(compared, reverse=number % 2 == 1):
                with peak_rise(device) as risen:
                    series[name].runs.append(compared[name].run(current))
                series[name].rises += risen
    finally:
        for pipeline in compared.values():
            pipeline.close()
    result = _summary(options, device, checkpoint, (width, height), prompt_pool, series, reference)
    del compared, shared
    if options.memory:
        result["peak_bytes"] = {name: run_in_subprocess(None, _peak, name, options, warmup) for name in series}
    if options.http:
        result["http_seconds"] = asyncio.run(_over_http(options, [warmup, first, *rest]))
    return result


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pipeline(name: str, options: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> Pipeline:
    if name == "theirs" and options.vs.startswith("openvino"):
        return OpenVinoPipeline(
            checkpoint, int8=options.vs.endswith("int8"), static=options.vs.endswith("static"), python=options.vs_python
        )
    if name == "theirs":
        compiled = options.vs == "diffusers-compiled"
        return DiffusersPipeline(checkpoint, options.vs_precision, device, compiled=compiled)
    precision = None if options.engine else options.precision
    largest = options.max_batch or options.batch
    return EnginePipeline(
        checkpoint,
        engine_dir=options.engine,
        backend=options.backend,
        precision=precision,
        device=str(device),
        max_batch=largest,
    )


def _reference(options: argparse.Namespace, workload: Workload) -> list[Pixels]:
    """Returns the workload's images in eager fp32, from weights rounded like the measured ones."""
    checkpoint = open_checkpoint(options.model, options.decoder)
    weights = SharedWeights(checkpoint.weights, DTYPES[options.vs_precision], keep=False)
    ours = EnginePipeline(
        replace(checkpoint, weights=weights),
        backend="eager",
        precision="fp32",
        device=str(_device(options)),
        max_batch=len(workload.prompts),
    )
    return ours.run(workload).images


def _peak(name: str, options: argparse.Namespace, workload: Workload) -> int:
    """Returns the most memory that one pipeline needs, loading included, in this fresh process."""
    device = _device(options)
    pipeline = _pipeline(name, options, open_checkpoint(options.model, options.decoder), device)
    pipeline.run(workload)
    pipeline.close()
    return pipeline.peak_bytes if isinstance(pipeline, OpenVinoPipeline) else peak_bytes(device)


async def _over_http(options: argparse.Namespace, workloads: Sequence[Workload]) -> dict[str, object]:
    """Sends the same workloads to a server of our own, as many requests at once as a batch holds."""
    flags = ["--model", options.model, "--backend", options.backend, "--max-batch", str(options.batch)]
    flags += ["--engine", options.engine] if options.engine else ["--precision", options.precision]
    flags += ["--decoder", options.decoder] if options.decoder else []
    seconds, overhead = [], []
    with running_server(flags) as served, tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(served.url, spool, timeout_s=600)
        for number, workload in enumerate(workloads):
            pairs = zip(workload.prompts, workload.seeds, strict=True)
            requests = [
                ImageRequest(text, seed, workload.steps, "png", workload.width, workload.height) for text, seed in pairs
            ]
            for record in await generator.closed_loop(requests, options.batch):
                if record.status != 200:
                    raise BenchError(f"http: got {record.status} {record.error} for {record.request}")
                if number:  # the first is the warm-up
                    seconds.append(record.seconds)
                    overhead.append(record.seconds - record.engine_ms / 1000)
        await generator.close()
        start = served.start_seconds
    return {"server_start": round(start, 3), "total": percentiles(seconds), "overhead": percentiles(overhead)}


def _summary(
    options: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
    size: tuple[int, int],
    prompt_pool: PromptPool,
    series: dict[str, Series],
    reference: list[Pixels] | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "program": "bench.latency",
        "command": options.command,
        "model": options.model,
        "checkpoint": checkpoint.name,
        "size": list(size),
        "steps": options.steps,
        "batch": options.batch,
        "runs": options.runs,
        "vs": options.vs,
        "device": str(device),
        "machine": host_facts() | {"threads": torch.get_num_threads()},
        "prompt_tokens": {"mean": statistics.fmean(prompt_pool.used), "max": max(prompt_pool.used)},
        "weights_rounded_to": options.vs_precision,
    }
    for name, entry in series.items():
        result[name] = entry.facts | {
            "load_seconds": round(entry.load_seconds, 3),
            "warmup_seconds": round(entry.warmup_seconds, 3),
            "seconds": {stage: percentiles(entry.seconds(stage)) for stage in (*STAGES, "total")},
            "rise_bytes": max(entry.rises),
            "parity_to_fp32": _parity(reference, entry.runs[0].images) if reference else None,
        }
    if "theirs" in series:
        ours, theirs = series["ours"], series["theirs"]
        result["parity_to_each_other"] = _parity(theirs.runs[0].images, ours.runs[0].images)
        result["ratios"] = {stage: round(theirs.median(stage) / ours.median(stage), 3) for stage in STAGES}
        result["ratio"] = round(theirs.median("total") / ours.median("total"), 3)
    return result


def _parity(expected: Sequence[Pixels], got: Sequence[Pixels]) -> dict[str, float]:
    """Returns PSNR in dB and the largest and mean difference in levels of 255, over all images."""
    images = [torch.stack([torch.tensor(pixels) for pixels in batch]) for batch in (expected, got)]
    result = difference(*images)
    return {
        "psnr_db": round(result.psnr_db or 0.0, 2),
        "max_abs": result.max_abs,
        "mean_abs": round(result.mean_abs, 4),
    }


def show(result: dict[str, Any]) -> str:
    """Returns the tables for people."""
    sides = [name for name in ("ours", "theirs") if name in result]
    head = ["seconds", *(f"{name} {kind}" for name in sides for kind in ("p50", "p95")), "ratio"]
    ratios = result.get("ratios", {}) | {"total": result.get("ratio")}
    rows: list[list[object]] = []
    for stage in (*STAGES, "total"):
        times = [result[name]["seconds"][stage][kind] for name in sides for kind in ("p50", "p95")]
        rows.append([stage, *times, ratios.get(stage)])
    facts: list[list[object]] = []
    for name in sides:
        entry = result[name]
        parity = entry["parity_to_fp32"] or {}
        facts.append(
            [
                name,
                entry["backend"],
                entry["precision"],
                parity.get("psnr_db"),
                parity.get("max_abs"),
                entry["rise_bytes"] / 2**20,
                result.get("peak_bytes", {}).get(name, 0) / 2**20 or None,
                entry["load_seconds"],
                entry["warmup_seconds"],
            ]
        )
    columns = (
        "",
        "backend",
        "precision",
        "PSNR to fp32, dB",
        "max abs",
        "rise, MiB",
        "peak, MiB",
        "load, s",
        "warm-up, s",
    )
    parts = [table(head, rows), "", table(columns, facts)]
    if "parity_to_each_other" in result:
        parts += ["", f"ours against theirs: {result['parity_to_each_other']}"]
    if "http_seconds" in result:
        total, over = result["http_seconds"]["total"], result["http_seconds"]["overhead"]
        parts += ["", f"over HTTP: p50 {total['p50']:.4f} s, beyond the engine's stages p50 {over['p50']:.4f} s"]
    return "\n".join(parts)
