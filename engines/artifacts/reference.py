"""The fp32 reference of one size: inputs and outputs of the modules on real prompts, stored beside the engines.

The transformer turns noise and text into a velocity, the decoder (and a second, fast one) the clean latent into pixels,
the encoder the pixels into a latent. `compare` runs each engine on the reference's inputs, and transformer and decoder
together.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.backends.adapters import Graph
from engines.backends.base import ModuleName
from engines.backends.parity import Difference, difference
from engines.errors import ArtifactError, ParityError
from engines.sampler import flow_time, input_scale

MODULES: tuple[ModuleName, ...] = ("transformer", "decoder", "encoder")  # of every engine
_INPUTS: Mapping[ModuleName, tuple[str, ...]] = {
    "transformer": ("latent", "text", "timestep", "guidance", "text_mask"),
    "decoder": ("clean",),
    "fast_decoder": ("clean",),
    "encoder": ("pixels",),
}
_OUTPUT: Mapping[ModuleName, str] = {
    "transformer": "velocity",
    "decoder": "pixels",
    "encoder": "encoded",
    "fast_decoder": "fast_pixels",
}
_ARGUMENT = {"clean": "latent"}
_HALVES = ("latent", "text")  # inputs in the transformer's dtype; the others have the same in every precision


def built_modules(*, fast: bool) -> tuple[ModuleName, ...]:
    """Returns the modules of an engine. fast: with a second decoder."""
    return (*MODULES, "fast_decoder") if fast else MODULES


@dataclass(frozen=True)
class Reference:
    """Inputs and outputs by name, fp32 (pixels uint8, text_mask bool), on the CPU."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Raises ArtifactError."""
        try:
            return cls(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"engine: {path} cannot be read ({error}); build it again") from error

    def inputs(self, name: ModuleName, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns the arguments of `name`'s forward; dtype: of the transformer."""
        arguments = {}
        for key in _INPUTS[name]:
            value = self.tensors[key]
            value = value.to(dtype) if name == "transformer" and key in _HALVES else value
            arguments[_ARGUMENT.get(key, key)] = value.to(device)
        return arguments

    def output(self, name: ModuleName) -> Tensor:
        return self.tensors[_OUTPUT[name]]

    def compare(
        self,
        open_graph: Callable[[ModuleName], Graph],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        fast: bool = False,
    ) -> tuple[dict[ModuleName, Difference], Difference]:
        """Returns the difference of each module, and that of the image of transformer and decoder together.

        Opens one graph at a time, so that no two are in memory. fast: with the second decoder. Raises ParityError if a
        decoder reports an image that is not finite.
        """
        graph = open_graph("transformer")
        velocity = graph(self.inputs("transformer", dtype, device))[0].cpu()
        differences: dict[ModuleName, Difference] = {"transformer": difference(self.output("transformer"), velocity)}
        del graph
        graph = open_graph("decoder")
        differences["decoder"] = self._decoded("decoder", graph, dtype, device)
        clean = clean_latent(self.tensors["latent"], velocity, self.tensors["timestep"])
        image = graph({"latent": clean.to(device)})[0]
        del graph
        graph = open_graph("encoder")
        encoded = graph(self.inputs("encoder", dtype, device))[0]
        differences["encoder"] = difference(self.output("encoder"), encoded)
        del graph
        if fast:
            differences["fast_decoder"] = self._decoded("fast_decoder", open_graph("fast_decoder"), dtype, device)
        return differences, difference(self.output("decoder"), image)

    def _decoded(self, name: ModuleName, graph: Graph, dtype: torch.dtype, device: torch.device | str) -> Difference:
        pixels, finite = graph(self.inputs(name, dtype, device))
        if not bool(finite.all()):
            raise ParityError(
                f"{name}: NaN or infinity where the fp32 reference is finite; build with --precision bf16"
            )
        return difference(self.output(name), pixels)

    def save(self, path: Path) -> None:
        save_file({key: value.contiguous() for key, value in self.tensors.items()}, path)
        path.chmod(0o644)  # safetensors makes it private; the server may run as another user


def clean_latent(x_flow: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """Returns the clean latent [B, C, h, w] in fp32, as the last line of engines.sampler.sample."""
    return x_flow - time[:, None, None, None] * velocity.float()


def reference_inputs(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x_FM of `noise` [B, C, h, w], t_FM [B] and guidance [B].

    The first row starts from pure noise, the others at later angles. Guidance differs too, so no input is a constant.
    """
    rows = noise.shape[0]
    angle = torch.linspace(torch.pi / 2, 1.3, rows) if rows > 1 else torch.tensor([torch.pi / 2])
    time = flow_time(angle)
    return input_scale(time)[:, None, None, None] * noise, time, torch.linspace(0.45, 0.5, rows)


@contextmanager
def max_activations(module: nn.Module) -> Iterator[dict[str, float]]:
    """Yields submodule name -> its largest absolute input or output during the block.

    Values that a submodule computes inside itself, which are fp32 in every precision, do not count.
    """
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            for value in (*inputs, output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
