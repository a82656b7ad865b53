"""Seeded malformed requests and websocket frames, as bytes for a raw socket, and odd optional fields."""

import base64
import io
import json
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from bench.robustness.malformed_images import bad_image
from bench.robustness.restarting_server import RestartingServer
from engines.fake import expected_pixels
from engines.types import Job

PATHS = (
    *("/generate", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/health/live", "/v1/live", "/", "/x"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/progress", "//sdapi/v1/interrupt/"),
)
METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "CONNECT", "G\0T", "post", "")
NAMES = (
    *("accept", "content-type", "content-length", "content-encoding", "transfer-encoding", "expect", "connection"),
    *("x-request-id", "traceparent", "tracestate", "authorization", "range", "host", "upgrade", "cookie", "te"),
    *("sec-websocket-key", "sec-websocket-version", "sec-websocket-protocol", "origin", "forwarded", "x-forwarded-for"),
)
VALUES = (
    *("", "*/*", "application/json", "image/png;q=0.1, application/json", "multipart/form-data; boundary=", "gzip"),
    *("0", "1", "-1", "00017", "99999999999999999999", "1e3", "0x10", "chunked", "chunked, identity", "100-continue"),
    *("close", "keep-alive, upgrade", "h2c", "websocket", "bytes=0-", "Bearer ", "Basic Og==", "null", "../../etc"),
    *("00-" + "0" * 32 + "-" + "0" * 16 + "-00", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "dGhlIHNhbXBsZSBub25jZQ=="),
    *("sana-sprint.live.v1", "bearer.AAAA", "%s%n", "\u00e9", "\x7f", "\x00", "a\tb", "x" * 9000),
)
FRAMING = ("content-length", "transfer-encoding", "host")
SETTINGS = (
    *("prompt", "seed", "mode", "width", "height", "output_format", "strength", "num_inference_steps", "other"),
    *("decoder", "aspect_ratio", "lora", "model"),
)
MODELS = ("one", "two", "two:x", "one,two", "one=two", "../two")  # the first two are served
SCALARS: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1,
    64,
    96,
    2**70,
    1.5,
    1e308,
    "",
    "x",
    "png",
    "image",
    "\u0000",
    "x" * 5000,
    "two",
    [],
    {},
)


SDAPI_FIELDS = (
    *("prompt", "negative_prompt", "seed", "steps", "cfg_scale", "width", "height", "batch_size", "n_iter", "styles"),
    *("denoising_strength", "send_images", "script_name", "script_args", "alwayson_scripts", "override_settings"),
    *("init_images", "mask", "sampler_name", "enable_hr", "tiling", "subseed", "sd_model_checkpoint", "other"),
    "decoder",
)
# Values that a server with two decoders and the adapters ring and night accepts, and some near them.
OPTIONS: dict[str, tuple[object, ...]] = {
    "decoder": ("full", "fast"),
    "aspect_ratio": ("1:1", "16:9", "9:16"),
    "lora": ({"ring": 1}, {"ring": -0.5, "night": 2}, {"ring": 0}, {}),
}
NEAR: dict[str, tuple[object, ...]] = {
    "decoder": ("Fast", "lite", "fast ", ["fast"]),
    "aspect_ratio": ("16/9", "0:0", "1:1\u0000", 1.78),
    "lora": ({"rign": 1}, {"ring": 9}, {"ring": "1"}, {"": 1}, {"ring": None}),
}
UNITS: tuple[object, ...] = (
    {"args": [{"image": "x", "weight": 9}]},
    {"args": [{"image": 7}, {"input_image": "", "enabled": False}]},
    {"args": {"image": "x"}},
    {"args": 7},
    [],
)


BLANK = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


def bad_sdapi(rng: random.Random) -> tuple[str, bytes]:
    """Returns a path of AUTOMATIC1111's API and a body with odd values in some fields."""
    fields: dict[str, object] = {"prompt": "x", "width": 64, "height": 64}
    for name in rng.sample(SDAPI_FIELDS, rng.randrange(5)):
        fields[name] = rng.choice(SCALARS)
    if rng.random() < 0.3:
        fields["alwayson_scripts"] = {rng.choice(("controlnet", "ControlNet", "ADetailer")): rng.choice(UNITS)}
    if rng.random() < 0.2:
        fields["override_settings"] = {rng.choice(("samples_format", "sd_model_checkpoint")): rng.choice(SCALARS)}
    path = rng.choice(("txt2img", "txt2img", "img2img", "options", "interrupt"))
    if path == "img2img":
        fields["init_images"] = [base64.b64encode(bad_image(rng)[1][: 2**18]).decode(), *rng.choices(SCALARS, k=1)][
            : rng.randrange(3)
        ]
    return f"/sdapi/v1/{path}", json.dumps(fields).encode()


def odd_model(rng: random.Random) -> bytes:
    """Returns a body whose `model` may be no name that is served."""
    return json.dumps({"prompt": "x", "width": 64, "height": 64, "model": rng.choice((*MODELS, *SCALARS))}).encode()


def bad_options(rng: random.Random) -> tuple[str, dict[str, object]]:
    """Returns a path and a body with decoder, aspect_ratio or lora; three quarters of their values are valid."""
    fields: dict[str, object] = {"prompt": "x", "seed": 1}
    for name in rng.sample(sorted(OPTIONS), rng.randrange(1, 4)):
        fields[name] = rng.choice(rng.choice((OPTIONS[name],) * 6 + (NEAR[name], SCALARS)))
    if "aspect_ratio" not in fields or rng.random() < 0.1:
        fields |= {"width": 64, "height": 64}
    return rng.choice(("/generate", "/generate", "/v1/images/generations", "/v1/images/edits")), fields


async def options_case(server: RestartingServer, rng: random.Random) -> str:
    """Sends odd decoders, aspect ratios and adapters; expects the image of the valid ones, or a 422 about the field."""
    path, fields = bad_options(rng)
    if path.endswith("edits"):
        fields["image"] = BLANK
    response = await server.exchange("POST", path, json.dumps(fields).encode())
    answer = {} if path == "/generate" and response.status == 200 else json.loads(response.body)
    if response.status == 422:
        named = [error["field"] for error in answer.get("errors", [])] or [answer.get("error", {}).get("param")]
        return "422" if all(named) else f"wrong: 422 that names no field for {fields}"
    if response.status != 200:
        return f"wrong: {response.status} for {fields}"
    return "200" if path != "/generate" or _is_of(response.body, fields) else f"wrong: another image for {fields}"


def _is_of(file: bytes, fields: Mapping[str, Any]) -> bool:
    """Returns whether the file holds the fake engine's image of these fields of /generate."""
    with Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(image.convert("RGB"))
    adapters = tuple((name, float(scale)) for name, scale in (fields.get("lora") or {}).items() if scale)
    height, width = pixels.shape[:2]
    job = Job("x", 1, width, height, lora=adapters, decoder=fields.get("decoder", "full"))
    return np.array_equal(pixels, expected_pixels(job, MODELS[0]))


def bad_request(rng: random.Random) -> bytes:
    """Returns odd header lines and a body that may not match them; half of the requests are valid HTTP/1.1."""
    well_formed = rng.random() < 0.5
    method = "POST" if rng.random() < 0.6 else rng.choice(METHODS[:9] if well_formed else METHODS)
    target = rng.choice(PATHS) if well_formed or rng.random() < 0.8 else "/" + rng.randbytes(9).decode("latin-1")
    version = "1.1" if well_formed else rng.choice(("1.1", "1.1", "1.0", "0.9", "2.0", "9"))
    lines = [f"{rng.choice(NAMES)}: {rng.choice(VALUES)}" for _ in range(rng.randrange(0, 9))]
    if well_formed:
        lines = [line for line in lines if line.isprintable() and not line.startswith(FRAMING)]
    elif rng.random() < 0.2:
        lines.append(rng.choice((" folded", "no colon", ": no name", "a b: c", "x:" + "y" * 70_000)))
    body = rng.choice(
        (
            b"",
            b"{}",
            b'{"prompt": "x", "width": 64, "height": 64}',
            b"5\r\nhello\r\n0\r\n\r\n",
            b"zz\r\n",
            odd_model(rng),
        )
    )
    if well_formed or rng.random() < 0.6:
        lines.append(f"content-length: {len(body)}")
    if rng.random() < 0.6:
        lines.append("content-type: application/json")
    ending = "\r\n" if well_formed else rng.choice(("\r\n", "\n"))
    head = ending.join([f"{method} {target} HTTP/{version}", "host: fuzz", *lines]) + ending * 2
    message = head.encode("latin-1", "replace") + body
    return message if well_formed or rng.random() < 0.8 else message[: rng.randrange(len(message) + 1)]


def handshake(rng: random.Random, port: int) -> bytes:
    key = base64.b64encode(rng.randbytes(16)).decode()
    return (
        f"GET /v1/live HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        f"sec-websocket-key: {key}\r\nsec-websocket-version: 13\r\n\r\n"
    ).encode()


def frame(opcode: int, content: bytes, mask: bytes | None, *, last: bool = True, announced: int | None = None) -> bytes:
    """Returns one frame of RFC 6455. `mask` None: unmasked, which the protocol forbids to clients."""
    length = len(content) if announced is None else announced
    bit = 0 if mask is None else 0x80
    if length < 126:
        size = bytes([bit | length])
    elif length < 2**16:
        size = bytes([bit | 126]) + struct.pack(">H", length)
    else:
        size = bytes([bit | 127]) + struct.pack(">Q", length)
    masked = content if mask is None else bytes(byte ^ mask[i % 4] for i, byte in enumerate(content))
    return bytes([(0x80 if last else 0) | opcode]) + size + (mask or b"") + masked


def bad_frame(rng: random.Random) -> bytes:
    """Returns settings with odd values, an invalid drawing, broken text, or a forbidden frame."""
    mask, choice = rng.randbytes(4), rng.random()
    if choice < 0.45:
        fields = {rng.choice(SETTINGS): rng.choice(SCALARS) for _ in range(rng.randrange(1, 4))}
        return frame(1, json.dumps({"prompt": "x", "width": 64, "height": 64} | fields).encode(), mask)
    if choice < 0.75:
        return frame(2, bad_image(rng)[1][: 2**18], mask)
    if choice < 0.85:
        return frame(1, rng.choice((b"", b"[]", b"{", b"nul", b'{"prompt": 1e999}', b"[" * 5000)), mask)
    forbidden = (
        frame(rng.randrange(16), rng.randbytes(rng.randrange(200)), mask, last=rng.random() < 0.7),
        frame(1, b"\xff\xfe\xc0", mask),
        frame(2, b"unmasked", None),
        frame(2, b"", mask, announced=rng.choice((2**31, 2**62, 2**63))),
        frame(8, rng.choice((b"", b"\x03", b"\x03\xe8bye", b"\xff\xff", b"\x03\xe8\xff")), mask),
        frame(9, rng.randbytes(rng.choice((0, 125, 126))), mask),
        bytes([0xF1]) + rng.randbytes(9),
    )
    return rng.choice(forbidden)
