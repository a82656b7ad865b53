"""torch.compile in place of a module, for the sizes it is told to be fast at; other sizes run as they are.

Flags: fullgraph (a graph break would be a silent loss), dynamic=False (kernels for each bucket and size, compiled while
the engine warms up), and on a GPU mode="max-autotune-no-cudagraphs" (kernels are timed; graphs are
engines.backends.cuda.graphs' business). torch keeps what it compiled on disk, under keys of its own, so each is held to
the module when it first runs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.adapters import (
    DecoderAdapter,
    EncoderAdapter,
    Graph,
    ModuleGraph,
    Side,
    TransformerAdapter,
    padded,
)
from engines.backends.base import ModuleSpec
from engines.backends.eager import laid_out
from engines.backends.parity import check_compiled
from engines.types import powers_of_two, smallest_fitting

_SHAPES = 64  # compiled per module at most; torch's own limit of 8 counts all modules of a class together


def compiled(module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """A drop-in for `module` whose first call at each bucket of a size in `spec.sizes` takes seconds to minutes."""
    module = laid_out(module, spec)
    plain, fast = ModuleGraph(module), _Compiled(module, spec)
    sides = spec.sides

    def at(side: Side) -> Graph:
        return fast if side in sides else plain

    if spec.name in ("transformer", "controlled"):
        return TransformerAdapter(at, spec.tokens)
    return DecoderAdapter(at) if spec.name == "decoder" else EncoderAdapter(at)


class _Compiled(ModuleGraph):
    def __init__(self, module: nn.Module, spec: ModuleSpec):
        mode = "max-autotune-no-cudagraphs" if spec.device.type == "cuda" else None
        fast: Any = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
        super().__init__(fast)
        self._plain, self._name, self._dtype = module, spec.name, spec.dtype
        self._buckets = powers_of_two(spec.max_batch)
        self._checked: set[tuple[torch.Size, ...]] = set()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        batch = next(iter(inputs.values())).shape[0]
        bucket = smallest_fitting(batch, self._buckets)
        held = {name: padded(value, bucket) for name, value in inputs.items()}
        shapes = tuple(value.shape for value in held.values())
        if shapes not in self._checked:
            check_compiled(f"{self._name} in batches of {bucket}", self._plain, self._run, held, self._dtype)
            self._checked.add(shapes)
        return [output[:batch] for output in self._run(held)]

    def _run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch._dynamo as dynamo  # a second of every start, for those who compile
        import torch._inductor.config as inductor

        # Inductor's own Triton convolution gives wrong numbers for 3x3 with 8 warps (pytorch issue 173068).
        exact = inductor.patch(max_autotune_conv_backends="ATEN")
        with dynamo.config.patch(recompile_limit=_SHAPES), exact:
            return super().__call__(inputs)
