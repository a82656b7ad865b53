"""CLIP networks of open_clip: for the CLIP score, for CMMD's embeddings, and HPSv2, which is a CLIP too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.quality.metrics.weights import Published, UnavailableError, WeightFile


@dataclass(frozen=True, slots=True)
class Architecture:
    """The open_clip name of a network, and its weights."""

    name: str
    weights: Published


def _openai(name: str, repository: str) -> Architecture:
    return Architecture(name, Published("open_clip_model.safetensors", hub=f"timm/{repository}.openai"))


SCORE = _openai("ViT-L-14-quickgelu", "vit_large_patch14_clip_224")  # NVlabs' tools/metrics/clip-score
SMALL = _openai("ViT-B-32-quickgelu", "vit_base_patch32_clip_224")
CMMD = _openai("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_336")  # google-research/cmmd, embedding.py
HPS = Architecture("ViT-H-14", Published("HPS_v2.1_compressed.pt", hub="xswu/HPSv2"))


class ImageText(Protocol):
    """A network that reads images and texts into one space. All embeddings have unit length."""

    @property
    def logit_scale(self) -> float: ...

    def prepare(self, image: Image.Image) -> Tensor: ...

    def images(self, batch: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D], each cut to 77 tokens."""


class OpenClip:
    """An ImageText of open_clip, in fp32."""

    def __init__(self, architecture: Architecture, weights: WeightFile, device: torch.device) -> None:
        """Raises UnavailableError where open_clip is not installed or the weights are another network's."""
        try:
            import open_clip
        except ImportError as error:
            raise UnavailableError(f"clip: the package {error.name} is missing; pip install '.[clip]'") from error
        name = architecture.name
        try:
            created: Any = open_clip.create_model_and_transforms(name, pretrained=str(weights.path), device=device)
        except RuntimeError as error:  # keys or shapes that do not fit
            first = str(error).splitlines()[0]
            raise UnavailableError(f"clip: {weights.path} holds no weights of {name}: {first}") from error
        self._network, _, self._transform = created
        self._network.eval()
        self._tokenizer: Any = open_clip.get_tokenizer(name)
        self._device = device

    @property
    def logit_scale(self) -> float:
        return float(self._network.logit_scale.exp())

    def prepare(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self._transform(image)
        return tensor

    @torch.inference_mode()
    def images(self, batch: Tensor) -> Tensor:
        return F.normalize(self._network.encode_image(batch.to(self._device)), dim=1).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(texts)).to(self._device)
        return F.normalize(self._network.encode_text(tokens), dim=1).float().cpu()
