"""Request bodies, images and errors of POST /generate, for both clients. Sends nothing."""

import base64
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import httpx

from sana_sprint_client.errors import GenerationError

ImageFormat = Literal["png", "jpeg", "webp"]
PATH = "/generate"
RANDOM_SEEDS = 2**32


class Options(TypedDict, total=False):
    """Fields of POST /generate; what is left out is the server's choice. `docs` of the server tell their bounds."""

    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    output_format: ImageFormat
    output_quality: int
    image: bytes | Path
    strength: float
    control_image: bytes | Path
    control_scale: float
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Image:
    """One image: the file, and the seed that makes it again."""

    content: bytes
    seed: int
    width: int
    height: int
    format: ImageFormat
    timings_ms: dict[str, float]

    def save(self, path: str | Path) -> Path:
        """Writes the file."""
        target = Path(path)
        target.write_bytes(self.content)
        return target


def bodies(prompt: str, count: int, seed: int | None, options: Options) -> list[dict[str, Any]]:
    """One body for each image, which is how they come one by one: image i has the seed + i.

    Images are given as files (bytes), or as paths of some.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, allowed: at least 1")
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None else seed
    fields: dict[str, Any] = {name: _sendable(value) for name, value in options.items()}
    return [{**fields, "prompt": prompt, "seed": first + i} for i in range(count)]


def headers(api_key: str | None) -> dict[str, str]:
    return {"accept": "application/json"} | ({} if api_key is None else {"authorization": f"Bearer {api_key}"})


def image_of(response: httpx.Response) -> Image:
    """Raises GenerationError for an answer that is none."""
    if response.status_code != 200:
        raise GenerationError(response.status_code, _problem(response))
    told = response.json()
    (made,) = told["images"]
    return Image(
        content=base64.b64decode(made["b64"]),
        seed=made["seed"],
        width=made["width"],
        height=made["height"],
        format=made["format"],
        timings_ms=told["timings_ms"],
    )


def _sendable(value: object) -> object:
    content = value.read_bytes() if isinstance(value, Path) else value
    return base64.b64encode(content).decode() if isinstance(content, bytes) else content


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The problem+json of an error; what a proxy in front says is its detail."""
    try:
        told = response.json()
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {"detail": response.text[:200]}
