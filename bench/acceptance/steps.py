"""The steps of an acceptance run: each proves or measures one thing of one checkpoint on the device.

A failed step records its reason and does not stop the others; no estimate replaces its figures. On a GPU each step runs
in its own process, because a kernel's error spoils CUDA for the rest of a process.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.acceptance.plan import AcceptanceConfig, SkippedError, StepResult
from bench.harness.errors import BenchError
from bench.harness.memory import peak_bytes
from bench.harness.pipelines import DiffusersPipeline, EnginePipeline, Pipeline, Workload
from bench.harness.subprocess_call import run_in_subprocess
from bench.harness.summary import STAGES, percentiles
from distill.evaluation.scores import evaluation_prompts
from engines.artifacts.manifest import NATIVE
from engines.artifacts.reference import max_activations
from engines.backends.cuda.graphs import CudaGraphCapture, EagerReplay
from engines.backends.parity import IMAGE_GATES, difference
from engines.build.builder import build
from engines.build.quantization import run_calibration
from engines.build.spec import BuildSpec
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import BackendError, OutOfMemoryError, SprintError
from engines.loader import load_engine
from engines.models.pixels import PixelDecoder
from engines.pipeline.calibration import calibration_prompts
from engines.types import Engine, Job, RawImage

T = TypeVar("T")

FP16_LARGEST = 65504
STEP_LIMIT_S = 2 * 3600  # the longest steps compile every kernel of five batch sizes


def accept(plan: AcceptanceConfig, tell: Callable[[StepResult], object]) -> list[StepResult]:
    """Runs the steps of `plan` in order, calls `tell` with each result and returns all."""
    done = []
    for name in (name for name, _ in _steps(plan) if not plan.only or name in plan.only):
        step = run_step_in_subprocess(plan, name) if plan.on_gpu else run_step(plan, name)
        tell(step)
        done.append(step)
    return done


def run_step(plan: AcceptanceConfig, name: str) -> StepResult:
    """Runs one step of `plan`; the result records any exception as the outcome."""
    step = StepResult(plan.model, name)
    began = time.perf_counter()
    try:
        dict(_steps(plan))[name](step)
    except SkippedError as error:
        step.outcome, step.reason = "skipped", str(error)
    except Exception as error:  # see above
        step.outcome, step.reason = "failed", _line(error)
    step.seconds = round(time.perf_counter() - began, 1)
    _free(plan)
    return step


def run_step_in_subprocess(plan: AcceptanceConfig, name: str) -> StepResult:
    """Calls `run_step` in a process of its own; if that dies, the step has failed."""
    began = time.perf_counter()
    try:
        return run_in_subprocess(STEP_LIMIT_S, run_step, plan, name)
    except BenchError as error:
        return StepResult(plan.model, name, "failed", str(error), round(time.perf_counter() - began, 1))


def _steps(plan: AcceptanceConfig) -> Iterator[tuple[str, Callable[[StepResult], None]]]:
    yield "activation ranges", lambda step: _ranges(plan, step)
    for precision in plan.precisions:
        yield f"build {precision}", lambda step, p=precision: _build(plan, p, step)  # type: ignore[misc]  # default
        yield f"pictures {precision}", lambda step, p=precision: _images(plan, p, step)  # type: ignore[misc]
    yield "graphs", lambda step: _graphs(plan, step)
    for precision in plan.precisions:
        yield f"latency engine {precision}", lambda step, p=precision: _latency(plan, step, _built(plan, p))  # type: ignore[misc]
    for backend in plan.backends:
        yield f"latency {backend}", lambda step, b=backend: _latency(plan, step, _unbuilt(plan, b))  # type: ignore[misc]
    for peer in plan.peers:
        yield f"latency {peer}", lambda step, p=peer: _latency(plan, step, _peer(plan, p))  # type: ignore[misc]


def _ranges(plan: AcceptanceConfig, step: StepResult) -> None:
    """Records the largest activation of decoder and transformer on calibration prompts, in fp32."""
    checkpoint = open_checkpoint(plan.model)
    unit = checkpoint.autoencoder.compression
    side = (plan.size[1] // unit, plan.size[0] // unit)
    with torch.inference_mode():
        transformer = checkpoint.load_transformer(torch.float32, plan.device)
        texts, channels = calibration_prompts(checkpoint), checkpoint.transformer.in_channels
        with max_activations(transformer) as seen_transformer:
            latents = run_calibration(transformer, texts, [side], plan.steps, channels)
        del transformer
        decoder = PixelDecoder(checkpoint.load_autoencoder(torch.float32, plan.device))
        with max_activations(decoder) as seen_decoder:
            for latent in latents:
                decoder(latent)
    for name, seen in (("decoder", seen_decoder), ("transformer", seen_transformer)):
        part, peak = max(seen.items(), key=lambda pair: pair[1])
        step.figures[name] = {"part": part, "peak": peak, "of_fp16": peak / FP16_LARGEST}


def _build(plan: AcceptanceConfig, precision: str, step: StepResult) -> None:
    """Builds engines in `precision`. Raises BenchError where an fp8 engine of TensorRT has no layer in fp8."""
    gpu = "native" if plan.on_gpu else "cpu"
    out = plan.folder(precision)
    jobs = os.cpu_count() or 1
    spec = BuildSpec(plan.model, gpu, precision, out, (plan.size,), plan.batches, plan.steps, jobs=jobs)
    built = build(spec)
    manifest = built.manifest
    step.figures = {
        "built": built.changed,
        "seconds": manifest.seconds,
        "vendor": f"{manifest.vendor} {manifest.versions.get(manifest.vendor, '')}".strip(),
        "pictures": manifest.pictures,
        "modules": {
            artifact.module: {
                "precision": artifact.precision,
                "bytes": sum(file.bytes for file in artifact.files),
                "seconds": artifact.seconds,
                "parity": artifact.parity,
                **artifact.details,
            }
            for artifact in manifest.artifacts
        },
    }
    layers = step.figures["modules"]["transformer"].get("layers_by_precision")
    if precision == "fp8" and manifest.vendor != NATIVE and not (layers or {}).get("FP8"):
        raise BenchError(f"no layer of the transformer runs in fp8; the inspector tells {layers}")


def _images(plan: AcceptanceConfig, precision: str, step: StepResult) -> None:
    """Compares images of built engines with eager fp32, with a second run and with batch 1.

    Raises BenchError, ParityError.
    """
    jobs = _jobs(plan, max(plan.batches), plan.steps[0])
    folder = str(_folder(plan, precision))
    engine = load_engine(plan.model, engine_dir=folder, device=str(plan.device), max_batch=len(jobs))
    engine.warmup()
    first, again = engine.generate(jobs), engine.generate(jobs)
    alone = [engine.generate([job])[0] for job in jobs]
    engine.close()
    _free(plan)
    eager = load_engine(plan.model, backend="eager", precision="fp32", device=str(plan.device))
    expected = [eager.generate([job])[0] for job in jobs]
    found = difference(_stack(expected), _stack(first))
    step.figures = {
        "batch": len(jobs),
        "psnr_db": found.psnr_db,
        "max_abs": found.max_abs,
        "same_twice": bool((_stack(first) == _stack(again)).all()),
        "alone_max_abs": difference(_stack(alone), _stack(first)).max_abs,
    }
    step.figures["gate"] = IMAGE_GATES[precision].check("picture", found)
    if not step.figures["same_twice"]:
        raise BenchError("the same jobs twice gave different bytes")


def _graphs(plan: AcceptanceConfig, step: StepResult) -> None:
    """Captures graphs of PyTorch's modules and compares replays with plain runs; a CPU repeats the launches instead."""
    precision = "bf16" if plan.on_gpu else "fp32"

    def load(largest: int) -> Engine:
        recorder = CudaGraphCapture() if plan.on_gpu else EagerReplay()
        options: dict[str, Any] = {"precision": precision, "device": str(plan.device), "max_batch": largest}
        engine = load_engine(plan.model, backend="cuda-graph", recorder=recorder, **options)
        began = time.perf_counter()
        engine.warmup()
        step.figures = {"told": engine.info.reasons["graphs"], "capture_seconds": round(time.perf_counter() - began, 1)}
        return engine

    engine = _largest_fitting(plan, load)
    batches = [batch for batch in plan.batches if batch <= engine.limits.max_batch]
    worst = 0.0
    found = {(steps, batch): engine.generate(_jobs(plan, batch, steps)) for steps in plan.steps for batch in batches}
    step.figures["uncaptured"] = sum(images[0].uncaptured for images in found.values())
    engine.close()
    _free(plan)
    plain = load_engine(
        plan.model, backend="eager", precision=precision, device=str(plan.device), max_batch=max(batches)
    )
    for (steps, batch), images in found.items():
        expected = plain.generate(_jobs(plan, batch, steps))
        worst = max(worst, difference(_stack(expected), _stack(images)).max_abs)
    step.figures["max_abs_to_eager"] = worst
    step.figures["device"] = "CUDA graphs" if plan.on_gpu else "no graphs: a stand-in ran the launches again"
    if worst > 1 and precision == "fp32":
        raise BenchError(f"replays differ from plain runs by {worst:.0f} of 255, allowed is 1")


def _largest_fitting(plan: AcceptanceConfig, load: Callable[[int], T]) -> T:
    """Returns the result of `load` for the largest batch that loads: memory or a kernel's indices may limit it.

    Raises the smallest batch's exception.
    """
    for largest in sorted(plan.batches, reverse=True)[:-1]:
        try:
            return load(largest)
        except (OutOfMemoryError, RuntimeError) as error:
            print(f"{plan.model}: batches of {largest} cannot be loaded: {_line(error)}", file=sys.stderr)
        _free(plan)  # outside of `except`: a traceback would hold the engine
    return load(min(plan.batches))


PipelineFactory = Callable[[], tuple[Pipeline, Mapping[str, object]]]


def _built(plan: AcceptanceConfig, precision: str) -> PipelineFactory:
    def make() -> tuple[Pipeline, Mapping[str, object]]:
        options: dict[str, Any] = {"device": str(plan.device), "max_batch": max(plan.batches)}
        engine = EnginePipeline(open_checkpoint(plan.model), engine_dir=str(_folder(plan, precision)), **options)
        return engine, {"who": "ours", "how": f"engine {precision}"}

    return make


def _unbuilt(plan: AcceptanceConfig, backend: str) -> PipelineFactory:
    def make() -> tuple[Pipeline, Mapping[str, object]]:
        precision = "bf16" if plan.on_gpu else "fp32"
        options: dict[str, Any] = {"precision": precision, "device": str(plan.device)}
        checkpoint = open_checkpoint(plan.model)

        def load(largest: int) -> EnginePipeline:
            return EnginePipeline(checkpoint, backend=backend, max_batch=largest, **options)

        try:
            return _largest_fitting(plan, load), {"who": "ours", "how": f"{backend} {precision}"}
        except BackendError as error:
            raise SkippedError(str(error)) from error

    return make


def _peer(plan: AcceptanceConfig, name: str) -> PipelineFactory:
    def make() -> tuple[Pipeline, Mapping[str, object]]:
        precision = "bf16" if plan.on_gpu else "fp32"
        try:
            rival = DiffusersPipeline(
                open_checkpoint(plan.model), precision, plan.device, compiled=name == "diffusers-compiled"
            )
        except ImportError as error:
            raise SkippedError(f"{error.name} is not installed") from error
        return rival, {"who": name, "how": precision}

    return make


def _latency(plan: AcceptanceConfig, step: StepResult, make: PipelineFactory) -> None:
    """Measures seconds by stage for every number of steps and batch, after one unmeasured run of each."""
    subject, told = make()
    step.figures = dict(subject.facts)
    texts = _texts()
    for steps in plan.steps:
        for batch in plan.batches:
            row: dict[str, Any] = {**told, "size": list(plan.size), "steps": steps, "batch": batch}
            step.rows.append(row)
            try:
                made = [subject.run(_task(plan, texts, steps, batch)) for _ in range(plan.runs + 1)][1:]
            except (SprintError, RuntimeError) as error:  # memory, and tensors of 2³¹ elements
                row["refused"] = _line(error)
                continue
            seconds = {stage: percentiles([one.seconds[stage] for one in made]) for stage in (*STAGES, "total")}
            total = seconds["total"]
            assert total is not None
            row |= {"seconds": seconds, "pictures_per_second": round(batch / total["p50"], 3)}
    step.figures["peak_bytes"] = peak_bytes(plan.device)
    if not any("seconds" in row for row in step.rows):
        raise BenchError(f"nothing could be measured: {step.rows[0].get('refused')}")


def _texts() -> Iterator[str]:
    """Yields captions without end; the number behind each keeps it out of caches."""
    captions = [prompt.text for prompt in evaluation_prompts(100)]
    number = 0
    while True:
        yield f"{captions[number % len(captions)]}, {number}"
        number += 1


def _task(plan: AcceptanceConfig, texts: Iterator[str], steps: int, batch: int) -> Workload:
    return Workload([next(texts) for _ in range(batch)], list(range(batch)), *plan.size, steps)


def _jobs(plan: AcceptanceConfig, count: int, steps: int) -> list[Job]:
    prompts = evaluation_prompts(count)
    return [Job(prompt.text, seed, *plan.size, steps) for seed, prompt in enumerate(prompts)]


def _folder(plan: AcceptanceConfig, precision: str) -> Path:
    folder = plan.folder(precision)
    if not folder.is_dir():
        raise SkippedError(f"no engines in {precision} were built")
    return folder


def _stack(images: Sequence[RawImage]) -> torch.Tensor:
    return torch.stack([torch.tensor(image.pixels) for image in images])


def _free(plan: AcceptanceConfig) -> None:
    gc.collect()
    if plan.on_gpu:
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    """Returns the message's first line, behind the type of an exception that is not ours."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, SprintError) else f"{type(error).__name__}: {text}"[:400]
