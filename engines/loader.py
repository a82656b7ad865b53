"""From a checkpoint's name to a ready engine: device, precision and backend are decided here, once, with the reason."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engines.artifacts.loading import LoadedModules, load_artifacts
from engines.artifacts.manifest import NATIVE, read_manifest
from engines.backends.base import CACHE, Backend, ModuleName, ModuleSpec
from engines.backends.compiled import compiled
from engines.backends.cuda.graphs import CudaGraphCapture, GraphCapture
from engines.backends.eager import eager
from engines.backends.tensorrt.torch_tensorrt import torch_tensorrt
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.checkpoints.controlnet import load_controlnet
from engines.checkpoints.lora import with_adapters
from engines.checkpoints.weights import FolderWeights
from engines.device.hardware import why_no_gpu
from engines.device.phases import Phases
from engines.errors import BackendError
from engines.models.controlnet import ControlledTransformer
from engines.models.lora import AdaptedTransformer, add_adapters
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.pipeline.engine import Modules, SprintEngine
from engines.pipeline.limits import limits_of, space_of
from engines.pipeline.runners import runners_of
from engines.pipeline.text_stage import load_text_stage
from engines.sampler import Schedule
from engines.types import AdapterOption, Engine, EngineInfo, powers_of_two

if TYPE_CHECKING:  # what needs Triton, which a CPU's environment has not
    from engines.artifacts.native.skeleton import Parts
    from engines.pipeline.native import Native

# By the name that --backend takes: what prepares a module when it is loaded, and what runs built engines.
BACKENDS: Mapping[str, Backend] = {
    "eager": eager,
    "compiled": compiled,
    "cuda-graph": eager,
    "torch-tensorrt": torch_tensorrt,
}
ARTIFACT_BACKENDS: Mapping[str, str] = {
    "openvino": "python build_engine.py --gpu cpu",
    "tensorrt": "python build_engine.py --gpu native --vendor tensorrt",
}

ADAPTING = ("eager", "cuda-graph")  # that take adapters by request

# Of weights and activations; int8 (on a CPU) and fp8 (on a GPU): bf16, the decoder's wide convolutions in 8 bits.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}


def load_engine(
    model: str | Checkpoint,
    *,
    engine_dir: str | None = None,
    backend: str = "auto",
    max_batch: int = 8,
    precision: str | None = None,
    device: str | None = None,
    decoder: str | None = None,
    controlnet: str | None = None,
    schedule: Schedule = "paper",
    recorder: GraphCapture | None = None,
    cache: str | None = None,
    native: "Native | None" = None,
    variant: str | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
    lora: Sequence[AdapterOption] = (),
) -> Engine:
    """Loads `model` (see engines.checkpoints.checkpoint) and makes it ready to generate.

    engine_dir: folder made by build_engine.py; backend: one of BACKENDS or of ARTIFACT_BACKENDS, or auto; precision:
    one of PRECISIONS, without engine_dir; device: cpu or cuda; None lets the machine decide. decoder: another
    autoencoder with the same latents; controlnet: folder or hub id, None takes the checkpoint's folder of that name
    where there is one; schedule: see engines.sampler.angles_for; recorder: what captures graphs, None takes CUDA's on
    a GPU; cache: folder for what backends compile when they load, None takes engines.backends.base.CACHE; native: the
    kernels of the cuda-graph backend, None takes those of the GPU at hand.
    variant: of the weights, where the checkpoint holds several; None takes the plain one, or the only one.
    sizes: (width, height) in pixels that are served, without engine_dir; empty: what the checkpoint says.
    lora: adapters; those with a scale are fused, the others are for jobs to choose (on eager and cuda-graph).
    On a GPU every backend but eager runs as captured graphs, one per (bucket, height, width, steps); `warmup` captures.
    Raises CheckpointError, BackendError, ArtifactError, ParityError.
    """
    reasons: dict[str, str] = {}
    phases = Phases()
    if engine_dir is not None:
        return _load_built(
            *(Path(engine_dir), model, backend, max_batch, precision, device, decoder, controlnet, schedule, recorder),
            *(variant, Path(cache or CACHE), native, phases, lora),
        )
    place = _device(device, reasons)
    backend = _backend(backend, place, recorder, reasons)
    precision = _precision(precision, place, backend, reasons)
    dtype, execute = PRECISIONS[precision], BACKENDS[backend]
    base = phases.timed("checkpoint", lambda: _opened(model, decoder, variant, reasons))
    checkpoint, free = with_adapters(base, lora, reasons)
    if free and backend not in ADAPTING:
        raise BackendError(
            f"lora {free[0].name}: {backend} takes adapters with a scale alone, which are fused, such as "
            f"--lora {free[0].name}={free[0].path}:1; by request they run on {' and '.join(ADAPTING)}"
        )
    with ThreadPoolExecutor() as threads:
        pool = _pool(threads, base)
        text_part = phases.begin("text encoder", lambda: load_text_stage(checkpoint, dtype, place), pool)
        transformer_part = phases.begin("transformer", lambda: checkpoint.load_transformer(dtype, place), pool)
        decoder_part = phases.begin("autoencoder", lambda: checkpoint.load_autoencoder(dtype, place), pool)
        branch = phases.timed("controlnet", lambda: load_controlnet(base, controlnet, dtype, place, variant))
    text, transformer, autoencoder = text_part.result(), transformer_part.result(), decoder_part.result()
    names = tuple(adapter.name for adapter in free)
    limits = limits_of(checkpoint, max_batch, control=branch is not None, adapters=names, sizes=sizes)

    def prepared(name: ModuleName, module: nn.Module) -> Callable[..., Any]:
        sizes, tokens = limits.sizes or (limits.default_size,), checkpoint.settings.max_prompt_tokens
        unit = checkpoint.autoencoder.compression
        spec = ModuleSpec(name, dtype, place, max_batch, tokens, sizes, unit, kept, int8=precision == "int8")
        return execute(module, spec)

    kept = Path(cache or CACHE)
    shapes = f"{checkpoint.transformer} {limits.sizes or limits.default_size} {precision}"
    kernels = _kernels(backend, dtype, place, checkpoint, kept, shapes) if native is None else native
    if kernels is not None:
        execute, text = kernels, kernels.text(text)
    whole: nn.Module | None = None if branch is None else ControlledTransformer(transformer, branch)
    chosen: nn.Module = transformer
    if free:
        choice = add_adapters(transformer, [adapter.factors for adapter in free])
        chosen, whole = (
            AdaptedTransformer(transformer, choice),
            None if whole is None else AdaptedTransformer(whole, choice),
        )
    modules = Modules(
        text,
        prepared("transformer", chosen),
        prepared("decoder", PixelDecoder(autoencoder)),
        prepared("encoder", PixelEncoder(autoencoder)),
        None if whole is None else prepared("controlled", whole),
    )
    space = space_of(checkpoint, dtype, place)
    if kernels is not None:
        if precision == "fp8":
            kernels.to_fp8(checkpoint, text, limits.default_size, place)
        reasons |= kernels.reasons
    buckets = () if backend == "eager" else powers_of_two(max_batch)
    recorder = None if backend == "eager" else _recorder(place, recorder)
    runners = runners_of(lambda: modules, checkpoint, space, limits, buckets, limits.steps, recorder, reasons)
    info = replace(_info(checkpoint, backend, precision, place, reasons), start_s=phases.seconds)
    return SprintEngine(modules, space, info, limits, schedule, buckets, runners, kernels)


def _load_built(
    folder: Path,
    model: str | Checkpoint,
    backend: str,
    max_batch: int,
    precision: str | None,
    device: str | None,
    decoder: str | None,
    controlnet: str | None,
    schedule: Schedule,
    recorder: GraphCapture | None,
    variant: str | None,
    cache: Path,
    native: "Native | None",
    phases: Phases,
    lora: Sequence[AdapterOption],
) -> Engine:
    """`load_engine` from built artifacts, which decide backend, precision, sizes and the largest batch."""
    manifest = read_manifest(folder)
    if backend not in ("auto", manifest.backend):
        raise BackendError(f"backend: got {backend!r}, and the engines in {folder} are of {manifest.backend!r}")
    if precision not in (None, manifest.precision):
        raise BackendError(f"precision: got {precision!r}, and the engines in {folder} are {manifest.precision}")
    reasons = {"backend": f"{manifest.backend}: what {folder} was built for", "precision": "that of the built engines"}
    if manifest.backend == "openvino" and device is None:
        device = "cpu"
    place = _device(device, reasons)
    base = phases.timed("checkpoint", lambda: _opened(model, decoder, variant, reasons))
    checkpoint, free = with_adapters(base, lora, reasons)
    if free:
        raise BackendError(
            f"lora {free[0].name}: built engines hold adapters fused, none by request; build one, and start with the "
            f"same: {manifest.command_with([option._replace(scale=option.scale or 1.0) for option in lora])}"
        )
    manifest.check_adapters([(one.name, one.scale or 0.0) for one in lora])
    # fp16 overflows in Gemma
    text_dtype = torch.float32 if place.type == "cpu" and manifest.vendor != NATIVE else torch.bfloat16
    loaded: LoadedModules | Parts
    if manifest.vendor == NATIVE:
        from engines.artifacts.native.loading import load_native

        loaded = parts = phases.timed(
            "engines", partial(load_native, folder, manifest, checkpoint, place, cache, native)
        )
        text = parts.text
    else:
        with ThreadPoolExecutor() as threads:  # the text encoder is read while engines are checked and opened
            pool = _pool(threads, base)
            reading = phases.begin("text encoder", lambda: load_text_stage(checkpoint, text_dtype, place), pool)
            loaded, parts = phases.timed("engines", lambda: load_artifacts(folder, checkpoint, place)), None
        text = reading.result()
    branch = load_controlnet(base, controlnet, text_dtype, place, variant)
    controlled: Callable[..., Any] | None = None
    if branch is not None and parts is not None:
        controlled = parts.controlled(branch)
    elif branch is not None:
        reasons["control"] = (
            "PyTorch: built engines hold no ControlNet, so pictures of drawings are denoised without them"
        )
        controlled = ControlledTransformer(checkpoint.load_transformer(text_dtype, place), branch)
    kernels = None if parts is None else parts.kernels
    reasons |= {} if kernels is None else kernels.reasons

    def modules() -> Modules:
        """Each time with execution contexts of their own, which a graph needs."""
        made = loaded.replica()
        return Modules(text, made.transformer, made.decoder, made.encoder, controlled)

    largest = max(manifest.batches)
    default = checkpoint.settings.default_size
    limits = replace(
        limits_of(checkpoint, min(max_batch, largest), control=branch is not None),
        sizes=manifest.sizes,
        default_size=default if default in manifest.sizes else manifest.sizes[-1],
    )
    reasons["batch"] = f"{limits.max_batch}: asked for {max_batch}, built for {largest}"
    space = space_of(checkpoint, loaded.dtype, place)
    buckets = tuple(batch for batch in manifest.batches if batch <= limits.max_batch) or manifest.batches[:1]
    recorder = _recorder(place, recorder)
    runners = runners_of(modules, checkpoint, space, limits, buckets, manifest.steps, recorder, reasons)
    info = _info(checkpoint, manifest.backend, manifest.precision, place, reasons)
    versions = {**info.versions, **manifest.versions}
    info = replace(info, manifest=manifest.told(), versions=versions, start_s=phases.seconds)
    return SprintEngine(modules(), space, info, limits, schedule, manifest.batches, runners, kernels)


def _pool(threads: ThreadPoolExecutor, checkpoint: Checkpoint) -> ThreadPoolExecutor | None:
    """Parts that lie in files are read and rounded side by side; those that are drawn wait for no disk."""
    return threads if isinstance(checkpoint.weights, FolderWeights) else None


def _kernels(
    backend: str, dtype: torch.dtype, device: torch.device, checkpoint: Checkpoint, cache: Path, shapes: str
) -> "Native | None":
    """Our own kernels, where the backend is made of them; other precisions than bf16 run PyTorch's."""
    if (backend, dtype, device.type) != ("cuda-graph", torch.bfloat16, "cuda"):
        return None
    from engines.pipeline.native import Native

    return Native.on(device, checkpoint.autoencoder, cache, shapes)


def _opened(model: str | Checkpoint, decoder: str | None, variant: str | None, reasons: dict[str, str]) -> Checkpoint:
    """Names the variants of the weights, where they are not the plain ones."""
    checkpoint = open_checkpoint(model, decoder, variant)
    if isinstance(checkpoint.weights, FolderWeights):
        why = "asked for" if variant else "the only weights there"
        told = [f"{name}: {why}, of {', '.join(parts)}" for name, parts in checkpoint.weights.variants().items()]
        if told:
            reasons["variant"] = "; ".join(told)
    return checkpoint


def _recorder(device: torch.device, asked: GraphCapture | None) -> GraphCapture | None:
    return CudaGraphCapture() if asked is None and device.type == "cuda" else asked


def _info(
    checkpoint: Checkpoint, backend: str, precision: str, device: torch.device, reasons: dict[str, str]
) -> EngineInfo:
    return EngineInfo(
        checkpoint=checkpoint.name,
        backend=backend,
        precision=precision,
        device=_device_name(device),
        versions={name: version(name) for name in ("torch", "tokenizers", "safetensors")},
        reasons=reasons,
        guidance_trained=checkpoint.settings.guidance_trained,
        max_prompt_tokens=checkpoint.settings.max_prompt_tokens,
    )


def _backend(asked: str, device: torch.device, recorder: GraphCapture | None, reasons: dict[str, str]) -> str:
    if asked == "auto":
        if device.type == "cuda":
            reasons["backend"] = "cuda-graph: a GPU is present, and no built engine was given"
            return "cuda-graph"
        reasons["backend"] = "eager: the one that runs everywhere; no built engine was given"
        return "eager"
    if asked in ARTIFACT_BACKENDS:
        raise BackendError(
            f"backend: {asked} runs built engines; build them with {ARTIFACT_BACKENDS[asked]} "
            "and give --engine DIR, or give --engine auto"
        )
    if asked not in BACKENDS:
        raise BackendError(f"backend: got {asked!r}, allowed auto, {', '.join((*BACKENDS, *ARTIFACT_BACKENDS))}")
    if asked == "cuda-graph" and device.type != "cuda" and recorder is None:
        raise BackendError("backend: cuda-graph needs an NVIDIA GPU, and the device is cpu; use eager or compiled")
    reasons["backend"] = f"{asked}: asked for"
    return asked


def _device(asked: str | None, reasons: dict[str, str]) -> torch.device:
    if asked is None:
        found = torch.cuda.is_available()
        reasons["device"] = "cuda: a GPU is present" if found else "cpu: torch sees no GPU"
        return torch.device("cuda", 0) if found else torch.device("cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise BackendError(f"device: got {asked!r}, allowed cpu, cuda, cuda:<index>")
    count = torch.cuda.device_count()
    if kind == "cuda" and count == 0:
        raise BackendError(f"device: got {asked!r}, but {why_no_gpu()}")
    if kind == "cuda" and int(index or 0) >= count:
        raise BackendError(f"device: got {asked!r}, but torch sees {count} GPUs; allowed cuda:0 to cuda:{count - 1}")
    reasons["device"] = f"{asked}: asked for"
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device(kind)


def _precision(asked: str | None, device: torch.device, backend: str, reasons: dict[str, str]) -> str:
    if asked is None:
        chosen = "fp32" if device.type == "cpu" else "bf16"
        reasons["precision"] = f"{chosen}: " + (
            "exact, and the CPU's default" if chosen == "fp32" else "as Sprint was trained"
        )
        return chosen
    if asked not in PRECISIONS:
        raise BackendError(f"precision: got {asked!r}, allowed {', '.join(PRECISIONS)}")
    if asked == "fp8" and (backend, device.type) != ("cuda-graph", "cuda"):
        raise BackendError(
            f"precision: fp8 without a built engine is the cuda-graph backend's on a GPU, and this is {backend} on "
            f"{device.type}; use bf16"
        )
    if asked == "int8" and (backend, device.type) != ("eager", "cpu"):
        raise BackendError(
            f"precision: int8 is the eager backend's on a CPU, and this is {backend} on {device.type}; use bf16"
        )
    reasons["precision"] = f"{asked}: asked for"
    return asked


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
