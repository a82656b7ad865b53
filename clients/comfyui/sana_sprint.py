"""A ComfyUI node that generates images on a sana-sprint-server: copy this file into ComfyUI's custom_nodes/.

It speaks HTTP, and needs no weights and only ComfyUI's own packages (torch, numpy, Pillow). The same prompt, seed and
options give the images of POST /generate, image i with the seed + i. The API key comes from SANA_SPRINT_API_KEY, so
that shared workflows do not hold it.
"""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

ATTEMPTS = 5  # while the server is full (429) or not ready (503)
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 300.0
MAX_SEED = 2**63 - 8  # image i of 8 has the seed + i


class SanaSprintGenerate:
    """Generates images [count, height, width, 3] from 0 to 1, from text and optionally an image or strokes."""

    CATEGORY = "SANA-Sprint"
    FUNCTION = "generate"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)
    DESCRIPTION = "Images of a sana-sprint-server, in one to four steps."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802  # ComfyUI's name
        return {
            "required": {
                "server": ("STRING", {"default": "http://127.0.0.1:8000"}),
                "prompt": ("STRING", {"multiline": True, "default": "a red circle on a white background"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
                "steps": ("INT", {"default": 1, "min": 1, "max": 4}),
                "guidance": ("FLOAT", {"default": 4.5, "min": 1.0, "max": 10.0, "step": 0.1}),
                "width": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 32, "tooltip": "0: the checkpoint's"}),
                "height": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 32, "tooltip": "0: the checkpoint's"}),
                "count": ("INT", {"default": 1, "min": 1, "max": 8}),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "the input image; the first of a batch"}),
                "strength": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
                "control_image": ("IMAGE", {"tooltip": "white strokes on black; needs a ControlNet at the server"}),
                "control_scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.01}),
                "decoder": (["full", "fast"], {"default": "full", "tooltip": "fast needs a second one at the server"}),
                "model": ("STRING", {"default": "", "tooltip": "of a server with several; empty: its first"}),
            },
        }

    def generate(
        self,
        server: str,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        count: int,
        image: torch.Tensor | None = None,
        strength: float = 0.5,
        control_image: torch.Tensor | None = None,
        control_scale: float = 1.0,
        decoder: str = "full",
        model: str = "",
    ) -> tuple[torch.Tensor]:
        """Returns the images. Raises RuntimeError with the server's own message."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "num_images": count,
        }
        chosen = (("width", width), ("height", height), ("model", model))
        body |= {name: value for name, value in chosen if value}
        if image is not None:
            body |= {"image": base64_png(image), "strength": strength}
        if control_image is not None:
            body |= {"control_image": base64_png(control_image), "control_scale": control_scale}
        if decoder != "full":  # servers before 0.3 do not know the field
            body["decoder"] = decoder
        response = post(server.rstrip("/") + "/generate", body)
        return (torch.stack([decode(output["b64"]) for output in response["images"]]),)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON response; repeats a refused request after the server's Retry-After."""
    headers = {"content-type": "application/json", "accept": "application/json"}
    if key := os.environ.get("SANA_SPRINT_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                content: dict[str, Any] = json.load(response)
                return content
        except urllib.error.HTTPError as error:
            after = error.headers.get("retry-after", "1")
            wait_s = float(after) if after.isdigit() else 1.0
            if error.code not in (429, 503) or attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                raise RuntimeError(f"{url}: {error.code} {error_detail(error.read())}") from error
            time.sleep(wait_s)
        except urllib.error.URLError as error:
            raise RuntimeError(f"{url}: {error.reason}; is a sana-sprint-server running there?") from error
    raise AssertionError("unreachable: the last attempt raises")


def error_detail(content: bytes) -> str:
    """Returns the message of an error's body."""
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def base64_png(images: torch.Tensor) -> str:
    """Encodes the first of [batch, height, width, 3] as a PNG file."""
    pixels = (images[0, :, :, :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decode(b64: str) -> torch.Tensor:
    """Decodes a file to [height, width, 3] from 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(b64))) as file:
        pixels = np.array(file.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)


NODE_CLASS_MAPPINGS = {"SanaSprintGenerate": SanaSprintGenerate}
NODE_DISPLAY_NAME_MAPPINGS = {"SanaSprintGenerate": "SANA-Sprint: Generate"}
