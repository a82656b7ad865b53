"""One set of weights for two pipelines: both hold the same tensors, so that a 2B text encoder fits."""

from collections.abc import Mapping

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engines.checkpoints.weights import Component, WeightSource, load_strict


class SharedWeights:
    """A WeightSource that reads each part once, in `dtype`, and hands out the same tensors again.

    Other dtypes are cast from those tensors, so all pipelines start from equally rounded weights. keep False: reads
    each part again and holds nothing, for a single pipeline in another dtype.
    """

    def __init__(self, source: WeightSource, dtype: torch.dtype, *, keep: bool = True) -> None:
        self._source, self._dtype, self._keep = source, dtype, keep
        self._cached: dict[Component, Mapping[str, Tensor]] = {}

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Loads a part. Raises CheckpointError if keys or shapes of `module` are not the checkpoint's."""
        if part not in self._cached:
            self._source.load_into(part, module, self._dtype, device)
            if self._keep:
                self._cached[part] = module.state_dict()
            else:
                for parameter in module.parameters():  # one by one: no second copy of the whole
                    parameter.data = parameter.data.to(dtype)
                return
        tensors = {key: tensor.to(device=device, dtype=dtype) for key, tensor in self._cached[part].items()}
        load_strict(module, tensors, f"shared {part}")
        module.to(device)  # buffers that no checkpoint holds

    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer()

    def sha256(self) -> str:
        return self._source.sha256()
