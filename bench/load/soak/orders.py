"""One request to each of the server's routes, drawn at random, with the pictures that its answer must hold."""

import base64
import binascii
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from bench.harness.http_client import Answer
from bench.robustness.scenario import SUBJECTS
from engines.fake import expected_pixels
from engines.types import Job, Pixels

SIDE = 256  # of most pictures
SIDES = (64, 128, 192, 256, 320)
LOSSY = 8.0  # mean difference of a byte that JPEG or WebP may make; another job's colours differ by dozens
PATHS = ("/v1/models", "/v1/info", "/health/live", "/health/ready", "/metrics", "/", "/openapi.json", "/docs")
BAD_VALUES: tuple[dict[str, object], ...] = (
    {"prompt": ""},
    {"prompt": "x", "width": 33},
    {"prompt": "x", "num_inference_steps": 9},
    {"prompt": "x", "seed": -5},
    {"prompt": "x", "image": "no picture"},
    {"prompt": "x", "colour": "red"},
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, the pictures of its answer, and its status."""

    kind: str
    method: str
    path: str
    body: bytes = b""
    media_type: str = "application/json"
    jobs: tuple[Job, ...] = ()
    status: int = 200

    def label(self, answer: Answer) -> str:
        """The status alone where the answer is what it must be, else what it is."""
        if answer.status != self.status:
            return f"{answer.status} {_code(answer)}".strip()
        try:
            files = _files(answer) if self.jobs else []
            right = len(files) == len(self.jobs) and all(map(_shows, files, self.jobs))
        except (KeyError, ValueError, OSError, binascii.Error) as error:
            return f"{answer.status} with {type(error).__name__}"
        return f"{self.status}" if right else f"{answer.status} wrong picture"


def ask(rng: random.Random) -> Ask:
    """The next request of a customer."""
    (make,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
    return make(rng)


def picture_file(rng: random.Random, side: int = 64) -> tuple[bytes, Pixels]:
    """A PNG of white strokes on black, and its pixels."""
    canvas = Image.new("RGB", (side, side))
    points = [(rng.randrange(side), rng.randrange(side)) for _ in range(4)]
    ImageDraw.Draw(canvas).line(points, fill="white", width=3)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue(), np.asarray(canvas)


def job(rng: random.Random, width: int = SIDE, height: int = SIDE, steps: int = 1) -> Job:
    """Prompts return, as people's do: the server's cache of them is hit and missed."""
    prompt = f"{rng.choice(SUBJECTS)} {rng.randrange(2000)}"
    return Job(prompt, rng.randrange(2**31), width, height, steps)


def _fields(one: Job) -> dict[str, object]:
    return {
        "prompt": one.prompt,
        "seed": one.seed,
        "width": one.width,
        "height": one.height,
        "num_inference_steps": one.steps,
    }


def _generate(kind: str, one: Job, **fields: object) -> Ask:
    return Ask(kind, "POST", "/generate", json.dumps(_fields(one) | fields).encode(), jobs=(one,))


def _plain(rng: random.Random) -> Ask:
    return _generate("plain", job(rng))


def _lossy(rng: random.Random) -> Ask:
    kind = rng.choice(("jpeg", "webp"))
    return _generate(kind, job(rng), output_format=kind, output_quality=rng.randrange(60, 96))


def _several(rng: random.Random) -> Ask:
    one, count = job(rng, 64, 64), rng.randrange(2, 9)
    jobs = tuple(replace(one, seed=one.seed + i) for i in range(count))
    return replace(_generate("several", one, num_images=count), jobs=jobs)


def _sizes(rng: random.Random) -> Ask:
    return _generate("sizes and steps", job(rng, rng.choice(SIDES), rng.choice(SIDES), rng.randrange(1, 5)))


def _image(rng: random.Random) -> Ask:
    file, pixels = picture_file(rng)
    name = rng.choice(("image", "control_image"))
    one = replace(job(rng), **{name: pixels})  # type: ignore[arg-type]  # both are pictures
    text = {name: base64.b64encode(file).decode()}
    return replace(_generate(name, one, **text), jobs=(one,))


def _openai(rng: random.Random) -> Ask:
    one = job(rng, 128, 128)
    fields = {"prompt": one.prompt, "seed": one.seed, "size": "128x128", "output_format": "png", "user": "soak"}
    return Ask("openai", "POST", "/v1/images/generations", json.dumps(fields).encode(), jobs=(one,))


def _edit(rng: random.Random) -> Ask:
    file, pixels = picture_file(rng)
    one = replace(job(rng, 128, 128), image=pixels)
    fields = {"prompt": one.prompt, "seed": str(one.seed), "size": "128x128"}
    parts = [f'--b\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    parts.append(b'--b\r\ncontent-disposition: form-data; name="image"; filename="x.png"\r\n\r\n' + file)
    body = b"".join(parts) + b"\r\n--b--\r\n"
    return Ask("edit", "POST", "/v1/images/edits", body, "multipart/form-data; boundary=b", (one,))


def _get(rng: random.Random) -> Ask:
    path = rng.choice(PATHS)
    return Ask(f"GET {path}", "GET", path)


def _bad(rng: random.Random) -> Ask:
    return Ask("bad value", "POST", "/generate", json.dumps(rng.choice(BAD_VALUES)).encode(), status=422)


KINDS: dict[Callable[[random.Random], Ask], float] = {
    _plain: 0.40,
    _lossy: 0.12,
    _several: 0.06,
    _sizes: 0.10,
    _image: 0.10,
    _openai: 0.06,
    _edit: 0.05,
    _get: 0.08,
    _bad: 0.03,
}


def _files(answer: Answer) -> list[bytes]:
    if answer.headers["content-type"].startswith("image/"):
        return [answer.body]
    told = json.loads(answer.body)
    texts = [one["b64"] for one in told["images"]] if "images" in told else [one["b64_json"] for one in told["data"]]
    return [base64.b64decode(text, validate=True) for text in texts]


def _shows(file: bytes, one: Job) -> bool:
    with Image.open(io.BytesIO(file)) as image:
        found, wanted = np.asarray(image.convert("RGB")), expected_pixels(one)
        if found.shape != wanted.shape or image.format == "PNG":
            return np.array_equal(found, wanted)
    return float(np.abs(found.astype(np.int16) - wanted).mean()) < LOSSY


def _code(answer: Answer) -> str:
    """Of a problem, or of OpenAI's envelope."""
    try:
        told = json.loads(answer.body)
    except ValueError:
        return ""
    return str(told.get("error", told).get("code", "")) if isinstance(told, dict) else ""
