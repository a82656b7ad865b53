"""Backend that runs a module through torch.compile at the sizes of its spec, and eagerly at other sizes.

fullgraph=True: a graph break would cost speed silently. dynamic=False: each bucket and size gets its own kernels, which
are compiled during warm-up. On a GPU mode="max-autotune-no-cudagraphs" times kernels; engines.backends.cuda.graphs
captures the graphs. torch caches compiled code on disk under its own keys, so the first run of each shape is compared
with the module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.adapters import Graph, HeightWidth, ModuleGraph, adapter_for, pad_batch
from engines.backends.base import ModuleSpec
from engines.backends.eager import to_channels_last
from engines.backends.parity import check_compiled
from engines.types import powers_of_two, smallest_fitting

_SHAPES = 64  # compiled per module at most; torch's own limit of 8 counts all modules of a class together


def compiled(module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """Returns a replacement for `module`; its first call at each bucket and size compiles for seconds to minutes."""
    module = to_channels_last(module, spec)
    eager_graph, compiled_graph = ModuleGraph(module), _CompiledGraph(module, spec)
    prepared = spec.input_sizes

    def graph_at(side: HeightWidth) -> Graph:
        return compiled_graph if side in prepared else eager_graph

    return adapter_for(spec.name, graph_at, spec.tokens)


class _CompiledGraph(ModuleGraph):
    def __init__(self, module: nn.Module, spec: ModuleSpec):
        mode = "max-autotune-no-cudagraphs" if spec.device.type == "cuda" else None
        compiled_graph: Any = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
        super().__init__(compiled_graph)
        self._eager_module, self._name, self._dtype = module, spec.name, spec.dtype
        self._buckets = powers_of_two(spec.max_batch)
        self._checked: set[tuple[torch.Size, ...]] = set()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        batch = next(iter(inputs.values())).shape[0]
        bucket = smallest_fitting(batch, self._buckets)
        bucket_inputs = {name: pad_batch(value, bucket) for name, value in inputs.items()}
        shapes = tuple(value.shape for value in bucket_inputs.values())
        if shapes not in self._checked:
            check_compiled(
                f"{self._name} in batches of {bucket}", self._eager_module, self._run, bucket_inputs, self._dtype
            )
            self._checked.add(shapes)
        return [output[:batch] for output in self._run(bucket_inputs)]

    def _run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch._dynamo as dynamo  # takes a second, so only this backend imports it
        import torch._inductor.config as inductor

        # Inductor's own Triton convolution gives wrong numbers for 3x3 with 8 warps (pytorch issue 173068).
        exact = inductor.patch(max_autotune_conv_backends="ATEN")
        with dynamo.config.patch(recompile_limit=_SHAPES), exact:
            return super().__call__(inputs)
