"""Variants of a checkpoint: backends, built engines, diffusers, and precisions emulated by rounding."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.harness.errors import BenchError
from bench.harness.pipelines import DTYPES, DiffusersPipeline, Workload
from bench.quality.fp8 import Fp8Checkpoint
from distill.evaluation.scores import Generate, engine_generator
from engines.backends.cuda.graphs import EagerReplay
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.loader import load_engine
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import load_text_stage
from engines.sampler import Schedule
from engines.types import Engine, Pixels

Generators = Callable[[int, Schedule], Generate]  # of a number of steps and a schedule, on one loaded checkpoint


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the checkpoint: `backend` with `argument`, and optionally another decoder."""

    backend: str
    argument: str
    decoder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parses <backend>:<precision>[+<decoder>]. Raises ValueError for text without two parts."""
        backend, _, rest = text.partition(":")
        argument, _, decoder = rest.partition("+")
        if not backend or not argument:
            raise ValueError(text)
        return cls(backend, argument, decoder or None)

    def __str__(self) -> str:
        return f"{self.backend}:{self.argument}" + (f"+{self.decoder}" if self.decoder else "")

    @property
    def emulated(self) -> bool:
        """True if computed by rounding, so that its time means nothing."""
        return self.backend == "emulated"


class Fp16Checkpoint(Checkpoint):
    """A checkpoint whose transformer has fp16 weights and layer outputs by rounding, computed in fp32."""

    def load_transformer(self, dtype: torch.dtype, device: torch.device) -> SprintTransformer:
        module = super().load_transformer(dtype, device)
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(value.half().to(value.dtype))
        for part in module.modules():
            if not any(part.children()):
                part.register_forward_hook(_rounded)
        return module


def _rounded(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.half().to(output.dtype) if isinstance(output, torch.Tensor) else output


NATIVE_FP8 = "native-fp8"  # what --precision fp8 serves on a GPU without a built engine
EMULATED: dict[str, type[Checkpoint]] = {"fp8": Fp8Checkpoint, "fp16": Fp16Checkpoint}


@contextmanager
def open_variant(variant: Variant, options: argparse.Namespace) -> Iterator[Generators]:
    """Loads the variant for the block. Raises BenchError, CheckpointError, BackendError, ArtifactError."""
    if variant.backend == "diffusers":
        yield _diffusers_generators(variant, options)
        return
    engines = [_engine(variant, options, schedule) for schedule in options.schedule]
    by_schedule = dict(zip(options.schedule, engines, strict=True))
    try:
        yield lambda steps, schedule: engine_generator(by_schedule[schedule], steps, options.guidance, options.size)
    finally:
        for engine in engines:
            engine.close()


def _engine(variant: Variant, options: argparse.Namespace, schedule: Schedule) -> Any:
    model: str | Checkpoint = options.model
    backend, precision, folder = variant.backend, variant.argument, None
    if variant.emulated and precision == NATIVE_FP8:
        return native_fp8_engine(open_checkpoint(options.model, variant.decoder), options.max_batch, schedule)
    if variant.emulated:
        if precision not in EMULATED:
            raise BenchError(f"variants: got {variant}, by rounding there are {', '.join((*EMULATED, NATIVE_FP8))}")
        model = EMULATED[precision](**vars(open_checkpoint(options.model)))
        backend, precision = "eager", "fp32"
    elif backend == "engine":
        backend, folder = "auto", variant.argument
    return load_engine(
        model,
        engine_dir=folder,
        backend=backend,
        precision=None if folder else precision,
        decoder=variant.decoder,
        max_batch=options.max_batch,
        schedule=schedule,
    )


def native_fp8_engine(checkpoint: Checkpoint, max_batch: int, schedule: Schedule = "paper") -> Engine:
    """Returns the cuda-graph backend's engine in fp8 as a GPU has it, by the references of its kernels on a CPU."""
    from engines.kernels.op import Ops  # needs Triton, optional on a CPU
    from engines.pipeline.native import NativeBackend

    cpu, native = torch.device("cpu"), NativeBackend(Ops(None), checkpoint.autoencoder)
    engine = load_engine(
        checkpoint,
        backend="cuda-graph",
        precision="bf16",
        device="cpu",
        max_batch=max_batch,
        schedule=schedule,
        recorder=EagerReplay(),
        native=native,
    )
    text = load_text_stage(checkpoint, torch.bfloat16, cpu)
    native.to_fp8(checkpoint, text, checkpoint.settings.default_size, cpu)
    return engine


def _diffusers_generators(variant: Variant, options: argparse.Namespace) -> Generators:
    if variant.argument not in DTYPES:
        raise BenchError(f"variants: got {variant}, diffusers runs in {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(options.model, variant.decoder)
    baseline = DiffusersPipeline(checkpoint, variant.argument, torch.device("cpu"), guidance=options.guidance)
    size = options.size or checkpoint.settings.default_size[0]

    def generators(steps: int, _: Schedule) -> Generate:
        def generate(texts: list[str], seeds: list[int]) -> Iterator[Pixels]:
            for first in range(0, len(texts), options.max_batch):
                batch = slice(first, first + options.max_batch)
                yield from baseline.run(Workload(texts[batch], seeds[batch], size, size, steps)).images

        return generate

    return generators
