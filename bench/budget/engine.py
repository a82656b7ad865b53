"""Counts requests of an engine on a simulated card, with weights that hold nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from string import ascii_lowercase
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench.budget.card import Card
from bench.budget.events import Event
from bench.harness.errors import BenchError
from engines import loader
from engines.artifacts.loading import LoadedModules
from engines.artifacts.manifest import Manifest
from engines.backends.adapters import Graph, ModuleGraph
from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.cuda.transformer import CudaTransformer
from engines.backends.eager import to_channels_last
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.checkpoints.weights import Component, WeightSource, load_strict
from engines.kernels.op import Ops
from engines.models.instruction import INSTRUCTION
from engines.models.pixels import PixelEncoder
from engines.pipeline.native import NativeBackend
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.types import Engine, Job

BACKENDS = ("cuda-graph", "tensorrt")
# Kernels choose tiles and grids for an H100, whatever card the counts are projected to.
PROCESSORS, CAPABILITY = 132, (9, 0)


@dataclass(frozen=True)
class Counted:
    """The card's events in one batch, and its peak memory with graphs and weights."""

    events: list[Event]
    peak_bytes: int


def count_request(
    model: str,
    backend: str,
    size: tuple[int, int],
    steps: int,
    batch: int,
    tokens: int,
    decoder: str | None = None,
    precision: str = "bf16",
    *,
    png: bool = False,
) -> Counted:
    """Calls `count_requests` for one number of steps."""
    [counted] = count_requests(model, backend, size, [steps], batch, tokens, decoder, precision, png=png)
    return counted


def count_requests(
    model: str,
    backend: str,
    size: tuple[int, int],
    steps: Sequence[int],
    batch: int,
    tokens: int,
    decoder: str | None = None,
    precision: str = "bf16",
    *,
    png: bool = False,
) -> list[Counted]:
    """Counts, for each of `steps`, one batch of new prompts of `tokens` tokens after warm-up.

    png: requests files, not pixels. Raises CheckpointError, BackendError, JobError, BenchError.
    """
    checkpoint = open_checkpoint(model, decoder)
    settings = replace(checkpoint.settings, default_size=size, sizes=(size,))
    checkpoint = replace(checkpoint, settings=settings, weights=_NoWeights(checkpoint.weights))
    card = Card("H100", PROCESSORS, CAPABILITY)
    texts, found = iter(prompts(checkpoint, tokens, batch * len(steps))), []
    with card.present():
        engine = _ENGINES[backend](card, checkpoint, size, batch, precision)
        engine.warmup()
        for count in steps:
            jobs = [
                Job(prompt, seed=index, width=size[0], height=size[1], steps=count, png=png)
                for index, prompt in enumerate(islice(texts, batch))
            ]
            card.clear()
            engine.generate(jobs)
            found.append(Counted(list(card.events), card.memory.peak))
    return found


def prompts(checkpoint: Checkpoint, tokens: int, count: int) -> list[str]:
    """Returns `count` different prompts of at least `tokens` tokens behind the instruction. Raises BenchError."""
    settings = checkpoint.settings
    instruction = INSTRUCTION if settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
    if not 1 <= tokens < settings.max_prompt_tokens:
        raise BenchError(f"tokens: got {tokens}, a prompt of this checkpoint has 1 to {settings.max_prompt_tokens - 1}")
    found = []
    for index in range(count):
        prompt = ascii_lowercase[index]
        while len(tokenizer.encode(prompt).tokens.ids) - len(tokenizer.prefix) < tokens:
            prompt += " qx"[len(prompt) % 3]
        found.append(prompt)
    return found


@dataclass(frozen=True)
class _NoWeights:
    """A WeightSource of tensors that hold nothing."""

    source: WeightSource

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        shapes = module.state_dict()
        load_strict(
            module, {key: torch.empty(like.shape, dtype=dtype, device=device) for key, like in shapes.items()}, part
        )
        module.to(device)

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def sha256(self) -> str:
        return "0" * 64


class _Trusted(NativeBackend):
    """A native backend that compares no values, because the card computes nothing."""

    def compare(self, work: Callable[[], object]) -> None:
        """Runs `work`."""
        work()

    def leave_out(self, transformer: CudaTransformer, inputs: Mapping[str, Tensor]) -> None:
        """Leaves out no product of 8 bits."""


def _of_kernels(card: Card, checkpoint: Checkpoint, _size: tuple[int, int], batch: int, precision: str) -> Engine:
    native = _Trusted(Ops(card.launcher), checkpoint.autoencoder)
    return loader.load_engine(
        checkpoint,
        backend="cuda-graph",
        device="cuda",
        precision=precision,
        max_batch=batch,
        recorder=card.recorder,
        native=native,
    )


class _Fused:
    """A built engine of one module, which counts as one launch: TensorRT shows no others."""

    def __init__(self, card: Card, name: str, module: Callable[..., Any]):
        self._card, self._name, self._graph = card, name, ModuleGraph(module)

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self._card.fused(self._name, lambda: self._graph(inputs))


def _of_built_engines(card: Card, checkpoint: Checkpoint, size: tuple[int, int], batch: int, precision: str) -> Engine:
    """Loads an engine as engines.loader does from a folder of build_engine.py, without that folder."""
    if precision != "bf16":
        raise BenchError(f"precision: got {precision!r}, and built engines are counted in bf16 alone")
    dtype, device = torch.bfloat16, torch.device("cuda")
    manifest = _manifest(checkpoint, size, batch)
    autoencoder = checkpoint.load_autoencoder(dtype, device)
    width, height = size
    unit = checkpoint.autoencoder.compression

    def graphs(name: ModuleName, module: nn.Module, side: tuple[int, int]) -> dict[tuple[int, int], Graph]:
        spec = ModuleSpec(name, dtype, device, batch, manifest.tokens, (size,), unit)
        return {side: _Fused(card, name, to_channels_last(module, spec))}

    latent = (height // unit, width // unit)
    loaded = LoadedModules(
        manifest,
        dtype,
        {
            "transformer": graphs("transformer", checkpoint.load_transformer(dtype, device), latent),
            "decoder": graphs("decoder", checkpoint.load_pixel_decoder(autoencoder, dtype, device), latent),
            "encoder": graphs("encoder", PixelEncoder(autoencoder), (height, width)),
        },
    )
    found: dict[str, Any] = {"read_manifest": lambda _: manifest, "load_artifacts": lambda *_: loaded}
    with patch.multiple(loader, **found):
        return loader.load_engine(
            checkpoint, engine_dir="engine", device="cuda", max_batch=batch, recorder=card.recorder
        )


def _manifest(checkpoint: Checkpoint, size: tuple[int, int], batch: int) -> Manifest:
    return Manifest(
        checkpoint=checkpoint.name,
        checkpoint_sha256=checkpoint.weights.sha256(),
        decoder=None,
        gpu="h100",
        device="H100",
        compute_capability="9.0",
        driver=None,
        backend="tensorrt",
        vendor="tensorrt",
        precision="bf16",
        sizes=(size,),
        batches=(batch,),
        steps=(1, 2, 3, 4),
        tokens=checkpoint.settings.max_prompt_tokens,
        versions={},
        executed=True,
        command="",
        fingerprint="",
        seconds=0.0,
        pictures={},
        references={},
        artifacts=(),
    )


_ENGINES: Mapping[str, Callable[[Card, Checkpoint, tuple[int, int], int, str], Engine]] = {
    "cuda-graph": _of_kernels,
    "tensorrt": _of_built_engines,
}
