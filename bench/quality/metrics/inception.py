"""FID's network: pytorch-fid's Inception with the weights that every published FID is measured by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.quality.metrics.weights import Published, UnavailableError

INCEPTION = Published(
    "pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)


class Inception:
    """[B, 3, H, W] in [0, 1] -> the 2048 features before the classifier (pool3), as pytorch-fid has them."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Raises UnavailableError where pytorch-fid is not installed."""
        try:
            from pytorch_fid.inception import InceptionV3
        except ImportError as error:
            raise UnavailableError(f"fid: the package {error.name} is missing; pip install '.[fid]'") from error
        with _as_torch_hub(weights):
            network: Any = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
        self._network, self._device = network.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, 2048]."""
        features: Tensor = self._network(images.to(self._device))[0]
        return features.flatten(1).cpu()


@contextmanager
def _as_torch_hub(weights: Path) -> Iterator[None]:
    """Within the block torch.hub, where pytorch-fid looks, finds `weights` as already downloaded."""
    before = torch.hub.get_dir()
    with TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / INCEPTION.file).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
