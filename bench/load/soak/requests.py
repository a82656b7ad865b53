"""Random requests to each route of the server, with the images that the response must hold."""

import base64
import binascii
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from bench.harness.http_client import HttpResponse
from bench.robustness.scenario import SUBJECTS
from engines.fake import expected_pixels
from engines.types import Job, Pixels

SIDE = 256  # pixels, of most images
SIDES = (64, 128, 192, 256, 320)
LOSSY_TOLERANCE = 8.0  # mean difference of a byte by JPEG or WebP; another job's colours differ by dozens
PATHS = ("/v1/models", "/v1/info", "/health/live", "/health/ready", "/metrics", "/", "/openapi.json", "/docs")
BAD_VALUES: tuple[dict[str, object], ...] = (
    {"prompt": ""},
    {"prompt": "x", "width": 33},
    {"prompt": "x", "num_inference_steps": 9},
    {"prompt": "x", "seed": -5},
    {"prompt": "x", "image": "no image"},
    {"prompt": "x", "colour": "red"},
)


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """A request, the jobs whose images it expects, and the expected status."""

    kind: str
    method: str
    path: str
    body: bytes = b""
    media_type: str = "application/json"
    jobs: tuple[Job, ...] = ()
    status: int = 200

    def label(self, response: HttpResponse) -> str:
        """Returns the status if the response is correct, otherwise a description of it."""
        if response.status != self.status:
            return f"{response.status} {_code(response)}".strip()
        try:
            files = _image_files(response) if self.jobs else []
            correct = len(files) == len(self.jobs) and all(map(_matches, files, self.jobs))
        except (KeyError, ValueError, OSError, binascii.Error) as error:
            return f"{response.status} with {type(error).__name__}"
        return f"{self.status}" if correct else f"{response.status} wrong image"


def random_request(rng: random.Random) -> SoakRequest:
    """Returns a client's next request."""
    (build,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
    return build(rng)


def drawing_file(rng: random.Random, side: int = 64) -> tuple[bytes, Pixels]:
    """Returns a PNG of white strokes on black, and its pixels."""
    canvas = Image.new("RGB", (side, side))
    points = [(rng.randrange(side), rng.randrange(side)) for _ in range(4)]
    ImageDraw.Draw(canvas).line(points, fill="white", width=3)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue(), np.asarray(canvas)


def random_job(rng: random.Random, width: int = SIDE, height: int = SIDE, steps: int = 1) -> Job:
    """Returns a random job. Prompts repeat, so the server's prompt cache is hit and missed."""
    prompt = f"{rng.choice(SUBJECTS)} {rng.randrange(2000)}"
    return Job(prompt, rng.randrange(2**31), width, height, steps)


def _fields(job: Job) -> dict[str, object]:
    return {
        "prompt": job.prompt,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
        "num_inference_steps": job.steps,
    }


def _generate(kind: str, job: Job, **fields: object) -> SoakRequest:
    return SoakRequest(kind, "POST", "/generate", json.dumps(_fields(job) | fields).encode(), jobs=(job,))


def _plain(rng: random.Random) -> SoakRequest:
    return _generate("plain", random_job(rng))


def _lossy(rng: random.Random) -> SoakRequest:
    kind = rng.choice(("jpeg", "webp"))
    return _generate(kind, random_job(rng), output_format=kind, output_quality=rng.randrange(60, 96))


def _batch(rng: random.Random) -> SoakRequest:
    job, count = random_job(rng, 64, 64), rng.randrange(2, 9)
    jobs = tuple(replace(job, seed=job.seed + i) for i in range(count))
    return replace(_generate("several", job, num_images=count), jobs=jobs)


def _sizes(rng: random.Random) -> SoakRequest:
    return _generate("sizes and steps", random_job(rng, rng.choice(SIDES), rng.choice(SIDES), rng.randrange(1, 5)))


def _image(rng: random.Random) -> SoakRequest:
    file, pixels = drawing_file(rng)
    name = rng.choice(("image", "control_image"))
    job = replace(random_job(rng), **{name: pixels})  # type: ignore[arg-type]  # both are pixels
    text = {name: base64.b64encode(file).decode()}
    return replace(_generate(name, job, **text), jobs=(job,))


def _openai(rng: random.Random) -> SoakRequest:
    job = random_job(rng, 128, 128)
    fields = {"prompt": job.prompt, "seed": job.seed, "size": "128x128", "output_format": "png", "user": "soak"}
    return SoakRequest("openai", "POST", "/v1/images/generations", json.dumps(fields).encode(), jobs=(job,))


def _edit(rng: random.Random) -> SoakRequest:
    file, pixels = drawing_file(rng)
    job = replace(random_job(rng, 128, 128), image=pixels)
    fields = {"prompt": job.prompt, "seed": str(job.seed), "size": "128x128"}
    parts = [f'--b\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    parts.append(b'--b\r\ncontent-disposition: form-data; name="image"; filename="x.png"\r\n\r\n' + file)
    body = b"".join(parts) + b"\r\n--b--\r\n"
    return SoakRequest("edit", "POST", "/v1/images/edits", body, "multipart/form-data; boundary=b", (job,))


def _get(rng: random.Random) -> SoakRequest:
    path = rng.choice(PATHS)
    return SoakRequest(f"GET {path}", "GET", path)


def _bad(rng: random.Random) -> SoakRequest:
    return SoakRequest("bad value", "POST", "/generate", json.dumps(rng.choice(BAD_VALUES)).encode(), status=422)


KINDS: dict[Callable[[random.Random], SoakRequest], float] = {
    _plain: 0.40,
    _lossy: 0.12,
    _batch: 0.06,
    _sizes: 0.10,
    _image: 0.10,
    _openai: 0.06,
    _edit: 0.05,
    _get: 0.08,
    _bad: 0.03,
}


def _image_files(response: HttpResponse) -> list[bytes]:
    if response.headers["content-type"].startswith("image/"):
        return [response.body]
    document = json.loads(response.body)
    texts = (
        [job["b64"] for job in document["images"]]
        if "images" in document
        else [job["b64_json"] for job in document["data"]]
    )
    return [base64.b64decode(text, validate=True) for text in texts]


def _matches(file: bytes, job: Job) -> bool:
    with Image.open(io.BytesIO(file)) as image:
        received, expected = np.asarray(image.convert("RGB")), expected_pixels(job)
        if received.shape != expected.shape or image.format == "PNG":
            return np.array_equal(received, expected)
    return float(np.abs(received.astype(np.int16) - expected).mean()) < LOSSY_TOLERANCE


def _code(response: HttpResponse) -> str:
    """Returns the code of a problem document, or of OpenAI's error envelope."""
    try:
        document = json.loads(response.body)
    except ValueError:
        return ""
    return str(document.get("error", document).get("code", "")) if isinstance(document, dict) else ""
