"""Loads an engine from a checkpoint: chooses device, precision and backend, and records the reasons."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engines.artifacts.loading import LoadedModules, load_artifacts
from engines.artifacts.manifest import NATIVE, read_manifest
from engines.backends.base import CACHE, Backend, ModuleName, ModuleSpec
from engines.backends.choice import INT8_MODULES, choose_device, choose_dtype, choose_precision
from engines.backends.compiled import compiled
from engines.backends.cuda.graphs import CudaGraphCapture, GraphCapture
from engines.backends.eager import eager
from engines.backends.tensorrt.torch_tensorrt import torch_tensorrt
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_fast_decoder
from engines.checkpoints.controlnet import load_controlnet
from engines.checkpoints.lora import with_adapters
from engines.checkpoints.weights import FolderWeights
from engines.device.phases import Phases
from engines.device.threads import choose_threads
from engines.errors import BackendError
from engines.models.controlnet import ControlledTransformer
from engines.models.lora import AdaptedTransformer, add_adapters
from engines.models.pixels import PixelEncoder
from engines.pipeline.engine import Modules, SprintEngine
from engines.pipeline.limits import limits_of, shapes_of, space_of
from engines.pipeline.runners import runners_of
from engines.pipeline.text_stage import TextStages
from engines.sampler import Schedule
from engines.types import AdapterOption, Engine, EngineInfo, powers_of_two

if TYPE_CHECKING:  # needs Triton, which is optional on a CPU
    from engines.artifacts.native.skeleton import NativeModules
    from engines.pipeline.native import NativeBackend

# Value of --backend -> the function that prepares a loaded module, or the command that builds its engines.
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

ADAPTING = ("eager", "cuda-graph")  # backends that take adapters by request


def load_engine(
    model: str | Checkpoint,
    *,
    engine_dir: str | None = None,
    backend: str = "auto",
    max_batch: int = 8,
    precision: str | None = None,
    device: str | None = None,
    decoder: str | None = None,
    fast_decoder: str | None = None,
    controlnet: str | None = None,
    schedule: Schedule = "paper",
    recorder: GraphCapture | None = None,
    cache: str | None = None,
    native: "NativeBackend | None" = None,
    variant: str | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
    lora: Sequence[AdapterOption] = (),
    texts: TextStages | None = None,
    threads_sleep: bool = False,
) -> Engine:
    """Loads `model` (see engines.checkpoints.checkpoint) for generation.

    engine_dir: folder of build_engine.py. backend: one of BACKENDS or ARTIFACT_BACKENDS, or auto. precision: one of
    PRECISIONS. device: cpu, cuda or cuda:<index>; None takes a GPU if torch sees one. decoder: another decoder of the
    same latents (open_checkpoint). fast_decoder: a second one, of which jobs may ask. controlnet: folder or hub id;
    None takes the checkpoint's own, if it has one. schedule: see engines.sampler.angles_for. recorder: captures graphs;
    None takes CUDA's on a GPU. cache: folder of what backends compile at load; None takes engines.backends.base.CACHE.
    native: kernels of the cuda-graph backend; None takes those of the GPU. variant: of the weights; None takes the
    plain one, or the only one. sizes: served (width, height) in pixels, without engine_dir; empty takes the
    checkpoint's. lora: adapters; those with a scale are fused, jobs choose from the others (eager and cuda-graph).
    texts: those that other engines of this thread share. threads_sleep: OpenMP's threads wait without spinning.
    On a GPU every backend but eager runs graphs of (bucket, height, width, steps), which `warmup` captures.
    Raises CheckpointError, BackendError, ArtifactError, ParityError.
    """
    options = _Options(
        *(model, backend, max_batch, precision, device, decoder, fast_decoder, controlnet, schedule, recorder),
        *(Path(cache or CACHE), native, variant, sizes, tuple(lora), texts or TextStages(), threads_sleep),
    )
    return _load_modules(options) if engine_dir is None else _load_built(Path(engine_dir), options)


@dataclass(frozen=True)
class _Options:
    """The arguments of `load_engine` but engine_dir."""

    model: str | Checkpoint
    backend: str
    max_batch: int
    precision: str | None
    device: str | None
    decoder: str | None
    fast_decoder: str | None
    controlnet: str | None
    schedule: Schedule
    recorder: GraphCapture | None
    cache: Path
    native: "NativeBackend | None"
    variant: str | None
    sizes: tuple[tuple[int, int], ...]
    lora: tuple[AdapterOption, ...]
    texts: TextStages
    threads_sleep: bool


def _load_modules(options: _Options) -> Engine:
    """Loads an engine whose backend prepares PyTorch modules."""
    reasons: dict[str, str] = {}
    phases = Phases()
    device = choose_device(options.device, reasons)
    backend = _backend(options.backend, device, options.recorder, reasons)
    precision = choose_precision(options.precision, device, backend, reasons)
    dtype, execute = choose_dtype(precision, device, reasons), BACKENDS[backend]
    base, fast = phases.timed("checkpoint", lambda: _open(options, reasons))
    checkpoint, selectable = with_adapters(base, options.lora, reasons)
    if selectable and backend not in ADAPTING:
        name = selectable[0].name
        raise BackendError(
            f"lora {name}: {backend} takes adapters with a scale alone, which are fused, such as "
            f"--lora {name}={selectable[0].path}:1; by request they run on {' and '.join(ADAPTING)}"
        )
    max_batch, cache = options.max_batch, options.cache
    with ThreadPoolExecutor() as threads:
        pool = _pool(threads, base)
        text_part = phases.begin("text encoder", partial(options.texts.load, checkpoint, dtype, device, cache), pool)
        transformer_part = phases.begin("transformer", lambda: checkpoint.load_transformer(dtype, device), pool)
        decoder_part = phases.begin("autoencoder", lambda: checkpoint.load_autoencoder(dtype, device), pool)
        load_fast = None if fast is None else partial(fast.load_pixel_decoder, None, dtype, device)
        fast_part = None if load_fast is None else phases.begin("fast decoder", load_fast, pool)
        load_branch = partial(load_controlnet, base, options.controlnet, dtype, device, options.variant)
        branch = phases.timed("controlnet", load_branch)
    text, transformer, autoencoder = text_part.result(), transformer_part.result(), decoder_part.result()
    fast_decoder = None if fast_part is None else fast_part.result()
    names = tuple(adapter.name for adapter in selectable)
    limits = limits_of(
        *(checkpoint, max_batch),
        control=branch is not None,
        adapters=names,
        sizes=options.sizes,
        fast_decoder=fast is not None,
    )

    def prepare(name: ModuleName, module: nn.Module) -> Callable[..., Any]:
        tokens, unit = checkpoint.settings.max_prompt_tokens, checkpoint.autoencoder.compression
        int8 = precision == "int8" and name in INT8_MODULES
        spec = ModuleSpec(name, dtype, device, max_batch, tokens, sizes, unit, cache, int8, reasons)
        return phases.timed(f"{name} for {backend}", partial(execute, module, spec))

    sizes = limits.sizes or (limits.default_size,)
    shapes = shapes_of(checkpoint, sizes, precision, max_batch, fast, control=branch is not None)
    kernels = options.native or _kernels(backend, dtype, device, checkpoint, cache, shapes)
    if kernels is not None:
        execute, text = kernels, options.texts.converted(text, kernels.text)
    controlled: nn.Module | None = None if branch is None else ControlledTransformer(transformer, branch)
    plain: nn.Module = transformer
    if selectable:
        choice = add_adapters(transformer, [adapter.factors for adapter in selectable])
        plain = AdaptedTransformer(transformer, choice)
        controlled = controlled and AdaptedTransformer(controlled, choice)
    modules = Modules(
        text,
        prepare("transformer", plain),
        prepare("decoder", checkpoint.load_pixel_decoder(autoencoder, dtype, device)),
        prepare("encoder", PixelEncoder(autoencoder)),
        None if controlled is None else prepare("controlled", controlled),
        None if fast_decoder is None else prepare("fast_decoder", fast_decoder),
    )
    if kernels is not None:
        if precision == "fp8":
            kernels.to_fp8(checkpoint, text, limits.default_size, device)
        reasons |= kernels.reasons
    space, buckets = space_of(checkpoint, dtype, device), () if backend == "eager" else powers_of_two(max_batch)
    recorder = None if backend == "eager" else _recorder(device, options.recorder)
    runners = runners_of(lambda: modules, checkpoint, space, limits, buckets, limits.steps, recorder, reasons)
    sleeping = options.threads_sleep and device.type == "cpu" and backend == "eager"
    count = choose_threads(transformer.config.dim, reasons) if sleeping else None
    info = _info(checkpoint, fast, backend, precision, device, reasons, phases)
    return SprintEngine(modules, space, info, limits, options.schedule, buckets, runners, kernels, count)


def _load_built(folder: Path, options: _Options) -> Engine:
    """Loads built engines, whose manifest decides backend, precision, sizes and the largest batch."""
    phases = Phases()
    manifest = read_manifest(folder)
    backend, precision = options.backend, options.precision
    if backend not in ("auto", manifest.backend):
        raise BackendError(f"backend: got {backend!r}, and the engines in {folder} are of {manifest.backend!r}")
    if precision not in (None, manifest.precision):
        raise BackendError(f"precision: got {precision!r}, and the engines in {folder} are {manifest.precision}")
    reasons = {"backend": f"{manifest.backend}: what {folder} was built for", "precision": "that of the built engines"}
    requested = "cpu" if manifest.backend == "openvino" and options.device is None else options.device
    device = choose_device(requested, reasons)
    base, fast = phases.timed("checkpoint", lambda: _open(options, reasons))
    checkpoint, selectable = with_adapters(base, options.lora, reasons)
    if selectable:
        fused = [option._replace(scale=option.scale or 1.0) for option in options.lora]
        raise BackendError(
            f"lora {selectable[0].name}: built engines hold adapters fused, none by request; build one, and start with "
            f"the same: {manifest.command_with(fused)}"
        )
    manifest.check_adapters([(option.name, option.scale or 0.0) for option in options.lora])
    # fp16 overflows in Gemma
    text_dtype = torch.float32 if device.type == "cpu" and manifest.vendor != NATIVE else torch.bfloat16
    built = None if manifest.fast_decoder is None else fast  # the second decoder, if the engines hold one
    loaded: LoadedModules | NativeModules
    if manifest.vendor == NATIVE:
        from engines.artifacts.native.loading import load_native

        largest, control = min(options.max_batch, max(manifest.batches)), options.controlnet is not None
        shapes = shapes_of(checkpoint, manifest.sizes, manifest.precision, largest, built, control=control)
        load = partial(load_native, folder, manifest, checkpoint, device, options.cache, shapes, options.native, built)
        loaded = native = phases.timed("engines", load)
        text = options.texts.adopt(native.text, checkpoint, text_dtype, device, native.kernels.text)
    else:
        with ThreadPoolExecutor() as threads:  # reads the text encoder while this thread opens the engines
            pool = _pool(threads, base)
            read_text = partial(options.texts.load, checkpoint, text_dtype, device, options.cache)
            reading = phases.begin("text encoder", read_text, pool)
            loaded, native = phases.timed("engines", lambda: load_artifacts(folder, checkpoint, device, built)), None
        text = reading.result()
    branch = load_controlnet(base, options.controlnet, text_dtype, device, options.variant)
    controlled: Callable[..., Any] | None = None
    if branch is not None and native is not None:
        controlled = native.controlled(branch)
    elif branch is not None:
        reasons["control"] = (
            "PyTorch: built engines hold no ControlNet, so images of drawings are denoised without them"
        )
        controlled = ControlledTransformer(checkpoint.load_transformer(text_dtype, device), branch)
    fast_decoder: Callable[..., Any] | None = None
    if fast is not None and built is None:
        spec = ModuleSpec("fast_decoder", text_dtype, device, max(manifest.batches))
        execute: Backend = eager if native is None else native.kernels
        fast_decoder = execute(fast.load_pixel_decoder(None, text_dtype, device), spec)
        command = manifest.command_with_fast_decoder(fast.decoder)
        reasons["fast_decoder"] = f"PyTorch: the built engines hold one decoder; for both: {command}"
    kernels = None if native is None else native.kernels
    reasons |= {} if kernels is None else kernels.reasons

    def modules() -> Modules:
        """Returns modules with execution contexts of their own, which each CUDA graph needs."""
        own = loaded.new_context()
        return Modules(text, own.transformer, own.decoder, own.encoder, controlled, own.fast_decoder or fast_decoder)

    largest = max(manifest.batches)
    default = wanted if (wanted := checkpoint.settings.default_size) in manifest.sizes else manifest.sizes[-1]
    max_batch, two = min(options.max_batch, largest), fast is not None
    limits = limits_of(checkpoint, max_batch, control=branch is not None, fast_decoder=two)
    limits = replace(limits, sizes=manifest.sizes, default_size=default)
    reasons["batch"] = f"{limits.max_batch}: asked for {options.max_batch}, built for {largest}"
    buckets = tuple(batch for batch in manifest.batches if batch <= limits.max_batch) or manifest.batches[:1]
    space, recorder = space_of(checkpoint, loaded.dtype, device), _recorder(device, options.recorder)
    runners = runners_of(modules, checkpoint, space, limits, buckets, manifest.steps, recorder, reasons)
    info = _info(checkpoint, fast, manifest.backend, manifest.precision, device, reasons, phases)
    info = replace(info, versions=info.versions | dict(manifest.versions), manifest=manifest.summary())
    return SprintEngine(modules(), space, info, limits, options.schedule, manifest.batches, runners, kernels)


def _pool(threads: ThreadPoolExecutor, checkpoint: Checkpoint) -> ThreadPoolExecutor | None:
    """Returns the pool for weights in files, which load in parallel; None for random ones, which wait for no disk."""
    return threads if isinstance(checkpoint.weights, FolderWeights) else None


def _kernels(
    backend: str, dtype: torch.dtype, device: torch.device, checkpoint: Checkpoint, cache: Path, shapes: str
) -> "NativeBackend | None":
    """Returns our own kernels for the cuda-graph backend in bf16 on a GPU; None otherwise."""
    if (backend, dtype, device.type) != ("cuda-graph", torch.bfloat16, "cuda"):
        return None
    from engines.pipeline.native import NativeBackend

    return NativeBackend.on(device, checkpoint.autoencoder, cache, shapes)


def _open(options: _Options, reasons: dict[str, str]) -> tuple[Checkpoint, Checkpoint | None]:
    """Opens the checkpoint, and again with its fast decoder; records variants of weights other than the plain one."""
    checkpoint = open_checkpoint(options.model, options.decoder, options.variant)
    if isinstance(checkpoint.weights, FolderWeights):
        why = "asked for" if options.variant else "the only weights there"
        variants = [f"{name}: {why}, of {', '.join(parts)}" for name, parts in checkpoint.weights.variants().items()]
        if variants:
            reasons["variant"] = "; ".join(variants)
    fast = options.fast_decoder
    return checkpoint, None if fast is None else open_fast_decoder(checkpoint, fast, options.variant)


def _recorder(device: torch.device, requested: GraphCapture | None) -> GraphCapture | None:
    return CudaGraphCapture() if requested is None and device.type == "cuda" else requested


def _info(
    checkpoint: Checkpoint,
    fast: Checkpoint | None,
    backend: str,
    precision: str,
    device: torch.device,
    reasons: dict[str, str],
    phases: Phases,
) -> EngineInfo:
    second = {} if fast is None else {"fast": fast.decoder}
    return EngineInfo(
        checkpoint=checkpoint.name,
        backend=backend,
        precision=precision,
        device="cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        versions={name: version(name) for name in ("torch", "tokenizers", "safetensors")},
        reasons=reasons,
        guidance_trained=checkpoint.settings.guidance_trained,
        max_prompt_tokens=checkpoint.settings.max_prompt_tokens,
        start_s=phases.seconds,
        decoders={"full": checkpoint.decoder, **second},
    )


def _backend(requested: str, device: torch.device, recorder: GraphCapture | None, reasons: dict[str, str]) -> str:
    if requested == "auto":
        if device.type == "cuda":
            reasons["backend"] = "cuda-graph: a GPU is present, and no built engine was given"
            return "cuda-graph"
        reasons["backend"] = "eager: the one that runs everywhere; no built engine was given"
        return "eager"
    if requested in ARTIFACT_BACKENDS:
        raise BackendError(
            f"backend: {requested} runs built engines; build them with {ARTIFACT_BACKENDS[requested]} "
            "and give --engine DIR, or give --engine auto"
        )
    if requested not in BACKENDS:
        raise BackendError(f"backend: got {requested!r}, allowed auto, {', '.join((*BACKENDS, *ARTIFACT_BACKENDS))}")
    if requested == "cuda-graph" and device.type != "cuda" and recorder is None:
        raise BackendError("backend: cuda-graph needs an NVIDIA GPU, and the device is cpu; use eager or compiled")
    reasons["backend"] = f"{requested}: asked for"
    return requested
