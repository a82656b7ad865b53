"""Chooses the CUDA graphs of an engine: stages, batches, sizes and steps."""

from collections.abc import Callable, Iterable, Sequence

import torch

from engines.backends.cuda.graphs import GraphCapture, GraphRunner, GraphRunners, InputSpec
from engines.checkpoints.checkpoint import Checkpoint
from engines.pipeline.denoise_decode import Decode, Denoise, input_specs, latent_spec
from engines.pipeline.engine import Modules
from engines.pipeline.limits import LatentSpace
from engines.pipeline.png import PngEncoder
from engines.types import Limits


def runners_of(
    modules: Callable[[], Modules],
    checkpoint: Checkpoint,
    space: LatentSpace,
    limits: Limits,
    buckets: Sequence[int],
    steps: Iterable[int],
    recorder: GraphCapture | None,
    reasons: dict[str, str],
) -> GraphRunners | None:
    """Returns the graphs for `buckets` at every size of the limits, or their default one; None without a recorder."""
    if recorder is None:
        return None
    unit, steps = space.compression, tuple(steps)
    sides = [(height // unit, width // unit) for width, height in limits.sizes or (limits.default_size,)]

    def denoise(*, drawing: bool) -> GraphRunner:
        def chain() -> Denoise:
            replica = modules()
            transformer = replica.controlled if drawing else replica.transformer
            assert transformer is not None
            return Denoise(transformer, space.dtype)

        tokens, width = checkpoint.settings.max_prompt_tokens, checkpoint.transformer.caption_channels
        specs = input_specs(space.channels, tokens, width, space.dtype, drawing=drawing, adapters=limits.max_adapters)
        return GraphRunner(chain, specs, buckets, sides, steps, recorder, space.device)

    # One image at a time: the engine delivers each when it is done, and memory does not grow with the batch.
    def decode(*, fast: bool) -> GraphRunner:
        def chain() -> Decode:
            replica = modules()
            decoder = replica.fast_decoder if fast else replica.decoder
            assert decoder is not None
            return Decode(decoder)

        return GraphRunner(chain, latent_spec(space.channels), (1,), sides, (1,), recorder, space.device)

    encode = PngEncoder(space.device)
    pixels = InputSpec(torch.uint8, lambda key: (key.bucket, key.height * unit, key.width * unit, 3))
    png = GraphRunner(lambda: encode, {"pixels": pixels}, (1,), sides, (1,), recorder, space.device)
    controlled = denoise(drawing=True) if "control" in limits.conditioning else None
    fast_decode = decode(fast=True) if "fast" in limits.decoders else None
    runners = GraphRunners(denoise(drawing=False), decode(fast=False), png, controlled, recorder, fast_decode)
    reasons["graphs"] = (
        f"{len(runners.plain.capture_order)} are captured before the first request: batches {_listed(buckets)}, "
        f"{len(sides)} size{'s' if len(sides) > 1 else ''}, steps {_listed(steps)}"
    )
    return runners


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
