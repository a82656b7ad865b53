"""Requests of real OpenAI clients and monitors that the documentation does not show."""

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from running_server import Running, Serve, image_file

from engines.types import Limits

PIXELS = np.full((64, 64, 3), 90, dtype=np.uint8)
FILE = image_file(PIXELS)
BASE64 = base64.b64encode(FILE).decode()
URL = f"data:image/png;base64,{BASE64}"
EDIT = {"prompt": "a red circle", "size": "64x64", "seed": 7}


def edited(running: Running) -> Any:
    """Returns the result of the documented form of an edit."""
    answer = running.client.post("/v1/images/edits", files={"image": FILE}, data={k: str(v) for k, v in EDIT.items()})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


JSON_IMAGES: list[dict[str, Any]] = [
    {"image": URL},
    {"image": BASE64},
    {"image": [URL]},
    {"image": {"image_url": URL}},
    {"image": {"url": URL}},
    {"images": [URL]},
    {"images": [{"image_url": URL}]},
    {"images": [{"image_url": {"url": URL}}]},
    {"images": [{"type": "image_url", "image_url": {"url": URL}}], "mask": None},
    {"image": BASE64.rstrip("=")},
    {"image": "data:image/png;base64," + BASE64.rstrip("=")},
    {"image": BASE64.replace("+", "-").replace("/", "_")},
]


@pytest.mark.parametrize("image_fields", JSON_IMAGES)
def test_an_edit_may_be_json(plain: Running, image_fields: dict[str, Any]) -> None:
    answer = plain.client.post("/v1/images/edits", json=EDIT | image_fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == edited(plain)


@pytest.mark.parametrize(
    "image_fields",
    [
        {},
        {"image": "https://a.example/x.png"},
        {"images": [{"image_url": "http://169.254.169.254/"}]},
        {"images": [{"file_id": "file-1"}]},
        {"images": [{"image_url": "file:///etc/passwd"}]},
        {"images": [URL, URL]},
        {"images": []},
        {"images": "x"},
        {"image": 7},
        {"image": URL, "mask": {"image_url": URL}},
        {"image": "not base64!"},
    ],
)
def test_an_edit_in_json_without_its_image_gets_422(plain: Running, image_fields: dict[str, Any]) -> None:
    answer = plain.client.post("/v1/images/edits", json=EDIT | image_fields)
    assert answer.status_code == 422
    assert "image" in answer.json()["error"]["message"] or "mask" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["image", "image[]"])
@pytest.mark.parametrize("text", [URL, BASE64, BASE64.rstrip("=")])
def test_a_form_may_hold_its_image_as_text(plain: Running, field: str, text: str) -> None:
    fields = {name: (None, str(value)) for name, value in {**EDIT, field: text}.items()}
    answer = plain.client.post("/v1/images/edits", files=fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == edited(plain)


def test_a_large_image_fits_into_a_field_of_a_form(plain: Running) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    text = "data:image/png;base64," + base64.b64encode(image_file(noise)).decode()
    fields = {name: (None, str(value)) for name, value in {**EDIT, "image": text}.items()}
    assert plain.client.post("/v1/images/edits", files=fields).status_code == 200


def test_empty_fields_of_a_form_are_absent(plain: Running) -> None:
    empty = {"n": "", "user": "", "response_format": "", "output_compression": "", "mask": "", "background": ""}
    fields: list[tuple[str, Any]] = [(name, (None, str(value))) for name, value in {**EDIT, **empty}.items()]
    fields += [("image", ("a.png", FILE)), ("mask", ("", b"")), ("image", ("", b""))]
    answer = plain.client.post("/v1/images/edits", files=fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == edited(plain)
    without = plain.client.post("/v1/images/edits", files={"image": FILE, "prompt": (None, "")})
    assert without.status_code == 422


@pytest.mark.parametrize("path", ["/v1/images/generations/", "//v1/images/generations", "/v1//images/generations//"])
def test_slashes_that_do_not_count_are_left_out(plain: Running, path: str) -> None:
    body = {"prompt": "x", "size": "64x64", "seed": 7}
    expected = plain.client.post("/v1/images/generations", json=body).json()["data"]
    answer = httpx.post(plain.url + path, json=body)
    assert answer.status_code == 200
    assert answer.json()["data"] == expected
    assert plain.metric("sana_sprint_requests_total", route="/v1/images/generations", status="200") >= 2


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1/info/"])
def test_get_with_a_slash_behind_it(plain: Running, path: str) -> None:
    assert httpx.get(plain.url + path).status_code == 200


def test_a_slash_opens_nothing(serve: Serve, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret")
    running = serve(api_key_file=str(keys))
    for path in ("//v1/models", "/v1/models/", "/static/../v1/models", "/v1//info"):
        assert httpx.get(running.url + path).status_code in (401, 404), path


def test_a_model_has_an_address(plain: Running) -> None:
    (listed,) = plain.client.get("/v1/models").json()["data"]
    assert plain.client.get(f"/v1/models/{listed['id']}").json() == listed
    assert plain.client.get(f"/v1/models/{listed['id']}/").json() == listed
    missing = plain.client.get("/v1/models/Other/Model")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert listed["id"] in missing.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_a_seed_of_minus_one_is_a_random_one(plain: Running, path: str) -> None:
    seeds = set()
    for _ in range(3):
        answer = plain.client.post(path, json={"prompt": "x", "size": "64x64", "seed": -1, "image": BASE64})
        assert answer.status_code == 200, answer.text
        seeds.add(answer.json()["data"][0]["seed"])
    assert len(seeds) == 3
    form = plain.client.post("/v1/images/edits", files={"image": FILE}, data={"prompt": "x", "seed": "-1"})
    assert form.status_code == 200
    assert plain.client.post(path, json={"prompt": "x", "seed": -2, "image": BASE64}).status_code == 422


GETS = ["/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/metrics", "/v1/info", "/v1/models"]
GETS += ["/v1/models/fake", "/static/style.css", "/nothing"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(plain: Running, path: str) -> None:
    got, head = plain.client.get(path), plain.client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert abs(int(head.headers["content-length"]) - int(got.headers["content-length"])) < 2000  # metrics move on


def test_head_says_that_it_is_not_ready(serve: Serve) -> None:
    import threading

    from engines.fake import FakeEngine

    gate = threading.Event()

    def load() -> FakeEngine:
        gate.wait()
        return FakeEngine()

    running = serve(load, ready=False)
    try:
        assert running.client.head("/health/ready").status_code == 503
        assert running.client.head("/health/live").status_code == 200
    finally:
        gate.set()


def test_what_is_not_taken_says_what_is(plain: Running) -> None:
    answer = plain.client.delete("/health/ready")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert plain.client.head("/generate").status_code == 405


# --- photographs ------------------------------------------------------------------------------------------------------


def photograph(width: int, height: int, image_format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, image_format, **options)
    return file.getvalue()


def upload(running: Running, content: bytes, **fields: str) -> httpx.Response:
    return running.client.post("/v1/images/edits", files={"image": content}, data={"prompt": "x"} | fields)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (512, 128, "512x128"),
        (128, 512, "128x512"),
        (1024, 1024, "256x256"),
        (1500, 1000, "288x192"),
        (4032, 3024, "288x224"),
        (30, 40, "224x288"),
    ],
)
@pytest.mark.parametrize("auto", [{}, {"size": "auto"}, {"size": ""}])
def test_an_edit_without_a_size_keeps_the_shape(
    plain: Running, width: int, height: int, size: str, auto: dict[str, str]
) -> None:
    assert plain.service.scheduler.engine.limits.default_size == (256, 256)
    answer = upload(plain, photograph(width, height), **auto)
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == size


@pytest.mark.parametrize(
    ("shape", "size"), [((4032, 3024), (1184, 896)), ((16, 9), (1376, 768)), ((1, 64), (96, 2048))]
)
def test_the_nearest_size_of_a_shape(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert Limits(max_batch=1, default_size=(1024, 1024)).size_for_aspect_ratio(*shape) == size
    built = ((1024, 1024), (1152, 864), (864, 1152))
    limits = Limits(max_batch=1, default_size=(1024, 1024), sizes=built)
    assert limits.size_for_aspect_ratio(*shape) in built
    assert limits.size_for_aspect_ratio(4, 3) == (1152, 864)


def test_a_size_that_is_asked_for_is_made(plain: Running) -> None:
    assert upload(plain, photograph(512, 128), size="64x64").json()["size"] == "64x64"
    assert upload(plain, photograph(512, 128), width="64", height="128").json()["size"] == "64x128"


def test_a_photograph_that_lies_on_its_side_keeps_the_shape_it_is_seen_in(plain: Running) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert upload(plain, photograph(512, 128, exif=exif)).json()["size"] == "128x512"


@pytest.mark.parametrize(("width", "height"), [(4032, 3024), (3024, 4032), (8064, 6048), (9000, 500), (2049, 10)])
def test_a_large_jpeg_is_taken(plain: Running, width: int, height: int) -> None:
    assert upload(plain, photograph(width, height), size="64x64").status_code == 200


def test_a_large_progressive_jpeg_is_taken_where_it_fits(plain: Running) -> None:
    assert upload(plain, photograph(4032, 3024, progressive=True), size="64x64").status_code == 200
    refused = upload(plain, photograph(9000, 6000, progressive=True, subsampling=0), size="64x64")
    assert refused.status_code == 422
    assert "9000x6000" in refused.json()["error"]["message"]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_other_large_images_are_refused_as_ever(plain: Running, image_format: str) -> None:
    refused = upload(plain, photograph(2049, 100, image_format), size="64x64")
    assert refused.status_code == 422
    assert "2049x100" in refused.json()["error"]["message"]


def test_a_large_jpeg_is_decoded_in_the_memory_of_a_small_one() -> None:
    """Runs in a fresh process, whose peak memory is its own."""
    import subprocess
    import sys

    from program import ROOT

    code = (
        "import io, resource, sys\n"
        "from PIL import Image\n"
        "from server.generation.image_codec import decode\n"
        "content = sys.stdin.buffer.read()\n"
        "decode('image', content[:int(sys.argv[1])], 0)\n"
        "first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pixels = decode('image', content[int(sys.argv[1]):], 0)\n"
        "print(pixels.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first)\n"
    )
    small, large = photograph(2048, 2048, "PNG"), photograph(8064, 6048)
    done = subprocess.run(
        [sys.executable, "-c", code, str(len(small))], input=small + large, cwd=ROOT, capture_output=True, check=True
    )
    shape, _, grown_kib = done.stdout.decode().rpartition(" ")
    assert shape == "(1512, 2016, 3)"
    assert int(grown_kib) < 16 * 1024  # 146 MB of pixels


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(64), "AVIF"),
        (photograph(8, 8, "GIF"), "GIF"),
        (photograph(8, 8, "BMP"), "BMP"),
        (photograph(8, 8, "TIFF"), "TIFF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (photograph(8, 8)[:40], "JPEG"),
    ],
)
def test_a_format_that_is_not_known_is_named(plain: Running, content: bytes, name: str) -> None:
    refused = upload(plain, content)
    assert refused.status_code == 422
    assert name in refused.json()["error"]["message"]
    assert "png, jpeg or webp" in refused.json()["error"]["message"]
    body = {"prompt": "x", "image": base64.b64encode(content).decode()}
    assert name in plain.client.post("/generate", json=body).json()["detail"]
