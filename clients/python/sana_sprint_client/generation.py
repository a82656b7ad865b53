"""Request bodies of POST /generate and parsing of its responses, for both clients."""

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
    """Optional fields of POST /generate, with the server's defaults; its /docs has their bounds."""

    model: str
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    aspect_ratio: str
    output_format: ImageFormat
    output_quality: int
    image: bytes | Path
    strength: float
    control_image: bytes | Path
    control_scale: float
    lora: dict[str, float]
    decoder: Literal["full", "fast"]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image, its seed, size and timings."""

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


def request_bodies(prompt: str, count: int, seed: int | None, options: Options) -> list[dict[str, Any]]:
    """Returns one body per image, so that each image comes when it is ready. Image i has the seed + i.

    Input images are encoded files, as bytes or as paths.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, allowed: at least 1")
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None else seed
    fields: dict[str, Any] = {name: _to_json(value) for name, value in options.items()}
    return [{**fields, "prompt": prompt, "seed": first + i} for i in range(count)]


def headers(api_key: str | None) -> dict[str, str]:
    return {"accept": "application/json"} | ({} if api_key is None else {"authorization": f"Bearer {api_key}"})


def parse_image(response: httpx.Response) -> Image:
    """Returns the image of a response. Raises GenerationError for an error response."""
    if response.status_code != 200:
        raise GenerationError(response.status_code, _problem(response))
    body = response.json()
    (image,) = body["images"]
    return Image(
        content=base64.b64decode(image["b64"]),
        seed=image["seed"],
        width=image["width"],
        height=image["height"],
        format=image["format"],
        timings_ms=body["timings_ms"],
    )


def _to_json(value: object) -> object:
    content = value.read_bytes() if isinstance(value, Path) else value
    return base64.b64encode(content).decode() if isinstance(content, bytes) else content


def _problem(response: httpx.Response) -> dict[str, Any]:
    """Returns the problem+json of an error. A proxy's text becomes its detail."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    return problem if isinstance(problem, dict) else {"detail": response.text[:200]}
