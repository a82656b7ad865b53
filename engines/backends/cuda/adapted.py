"""The GPU path's transformer with an adapter selection per job (engines.models.lora)."""

from typing import Any

from torch import Tensor

from engines.backends.cuda.controlled import CudaControlled
from engines.backends.cuda.transformer import CudaTransformer
from engines.models.lora import ActiveAdapters, AdapterSelection
from engines.sampler import Denoiser


class CudaAdapted:
    """Replaces engines.models.lora.AdaptedTransformer; `active` belongs to the modules that `inner` was made of."""

    def __init__(self, inner: CudaTransformer | CudaControlled, active: ActiveAdapters):
        self.inner, self._active = inner, active

    def __call__(self, *arguments: Any, chosen: AdapterSelection | None = None) -> Tensor:
        with self._active.use(chosen):
            return self.inner(*arguments)

    def denoiser(self, *arguments: Any, chosen: AdapterSelection | None = None) -> Denoiser:
        """Returns the denoiser of `inner` with the adapters of `chosen`."""
        with self._active.use(chosen):
            inner = self.inner.denoiser(*arguments)

        def velocity(latent: Tensor, timestep: Tensor) -> Tensor:
            with self._active.use(chosen):
                return inner(latent, timestep)

        return velocity
