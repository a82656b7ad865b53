"""POST /generate: the answer to every field, as bytes and as JSON."""

import re
from typing import Any

import httpx
import numpy as np
import pybase64
import pytest
from running_server import Running, Serve, image_file, read_image

from engines.fake import FakeEngine, expected_pixels
from engines.types import MAX_SEED, Job, Pixels
from server.http.routes.generate import prefers_json

JSON = {"accept": "application/json"}
JOB = Job("a red circle", seed=7, width=64, height=64)


def stripes(height: int = 48, width: int = 80) -> Pixels:
    return (np.arange(height * width * 3).reshape(height, width, 3) % 251).astype(np.uint8)


def b64(content: bytes) -> str:
    return pybase64.b64encode(content).decode()


def fault_fields(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 422, answer.text
    return [error["field"] for error in answer.json()["errors"]]


def test_bytes_carry_the_image_its_seed_and_its_timings(plain: Running) -> None:
    answer = plain.generate(seed=7)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "7"
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert "x-prompt-truncated" not in answer.headers
    np.testing.assert_array_equal(read_image(answer.content), expected_pixels(JOB))
    stages = dict(re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"]))
    assert list(stages) == ["queue", "text", "denoise", "decode", "encode", "total"]
    parts = [float(stages[name]) for name in stages if name != "total"]
    assert 0 < sum(parts) <= float(stages["total"]) + 0.05


def test_json_on_request_has_the_contracts_shape(plain: Running) -> None:
    answer = plain.client.post("/generate", json={"prompt": "a red circle", "seed": 7}, headers=JSON)
    body = answer.json()
    assert list(body) == ["id", "created", "model", "images", "timings_ms", "prompt_truncated"]
    assert body["id"] == answer.headers["x-request-id"]
    assert (body["model"], body["prompt_truncated"]) == ("fake", False)
    assert list(body["timings_ms"]) == ["queue", "text", "denoise", "decode", "encode", "total"]
    (image,) = body["images"]
    assert {name: image[name] for name in ("seed", "width", "height", "format")} == {
        "seed": 7,
        "width": 256,
        "height": 256,
        "format": "png",
    }
    expected = expected_pixels(Job("a red circle", seed=7, width=256, height=256))
    np.testing.assert_array_equal(read_image(pybase64.b64decode(image["b64"])), expected)


def test_image_i_uses_seed_plus_i_and_can_be_asked_for_alone(plain: Running) -> None:
    images = plain.generate(seed=7, num_images=8).json()["images"]
    assert [image["seed"] for image in images] == list(range(7, 15))
    alone = plain.generate(seed=images[5]["seed"])
    assert alone.content == pybase64.b64decode(images[5]["b64"])


def test_a_random_seed_is_returned_and_gives_the_same_bytes_again(plain: Running) -> None:
    first, second = plain.generate(seed=None), plain.generate()
    assert first.headers["x-seed"] != second.headers["x-seed"]
    assert plain.generate(seed=int(first.headers["x-seed"])).content == first.content


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_formats(plain: Running, image_format: str) -> None:
    answer = plain.generate(seed=7, output_format=image_format, output_quality=95)
    assert answer.headers["content-type"] == f"image/{image_format}"
    difference = read_image(answer.content).astype(int) - expected_pixels(JOB)
    assert np.abs(difference).mean() < (0.01 if image_format == "png" else 3)


def test_quality_decides_the_size_of_a_jpeg(plain: Running) -> None:
    size = {q: len(plain.generate(width=256, seed=1, output_format="jpeg", output_quality=q).content) for q in (10, 90)}
    assert size[10] < size[90]


def test_steps_and_guidance_reach_the_engine(plain: Running) -> None:
    answer = plain.generate(seed=7, num_inference_steps=3, guidance_scale=6.5)
    job = Job("a red circle", seed=7, width=64, height=64, steps=3, guidance_scale=6.5)
    np.testing.assert_array_equal(read_image(answer.content), expected_pixels(job))


def test_a_cut_prompt_is_said_in_both_forms(plain: Running) -> None:
    long = "word " * 301
    assert plain.generate(long).headers["x-prompt-truncated"] == "true"
    assert plain.generate(long, num_images=2).json()["prompt_truncated"] is True


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_image_to_image_and_strokes_reach_the_engine(plain: Running, prefix: str) -> None:
    image, strokes = stripes(), np.full((20, 30, 3), 128, dtype=np.uint8)
    answer = plain.generate(
        seed=7,
        image=prefix + b64(image_file(image)),
        strength=0.25,
        control_image=prefix + b64(image_file(strokes)),
        control_scale=0.5,
    )
    job = Job("a red circle", 7, 64, 64, image=image, strength=0.25, control_image=strokes, control_scale=0.5)
    np.testing.assert_array_equal(read_image(answer.content), expected_pixels(job))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("prompt", ["x", "é" * 4000, " "], ["", "x" * 4001, 5, None, ["x"]]),
        ("num_inference_steps", [1, 4, 2.0], [0, 5, 1.5, "2", True, None]),
        ("guidance_scale", [1, 10, 4.5], [0.99, 10.01, "4.5", True, None]),
        ("seed", [0, MAX_SEED, None], [-1, MAX_SEED + 1, 1.5, "7"]),
        ("num_images", [1, 8], [0, 9, "1", None]),
        ("output_format", ["png", "jpeg", "webp"], ["gif", "PNG", 1, None]),
        ("output_quality", [1, 100], [0, 101, 50.5, None]),
        ("strength", [0, 1], [-0.1, 1.1, "x"]),
        ("control_scale", [0, 2], [-0.1, 2.1, "x"]),
        ("timeout_ms", [60_000, 3_600_000, None], [0, -5, 3_600_001, "1"]),
        ("image", [None], ["", "!!!!", "aGVsbG8=", 5]),
        ("control_image", [None], ["", "!!!!", "aGVsbG8=", 5]),
    ],
)
def test_bounds_of_every_field(plain: Running, field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        answer = plain.generate(**{field: value})
        assert answer.status_code == 200, (field, value, answer.text[:300])
    for value in bad:
        answer = plain.generate(**{field: value})
        assert fault_fields(answer) == [field], (field, value)
        detail = answer.json()["errors"][0]["detail"]
        assert detail.startswith(f"{field}: got "), detail
        assert "allowed" in detail


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(plain: Running, constant: str) -> None:
    body = '{"prompt": "x", "guidance_scale": ' + constant + "}"
    answer = plain.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert fault_fields(answer) in (["guidance_scale"], ["body"])


def test_a_seed_too_large_for_its_last_image_is_refused(plain: Running) -> None:
    assert plain.generate(seed=MAX_SEED - 1, num_images=2).status_code == 200
    answer = plain.generate(seed=MAX_SEED, num_images=2)
    assert fault_fields(answer) == ["seed"]
    assert f"for 2 images, allowed: 0 to {MAX_SEED - 1}" in answer.json()["detail"]


@pytest.mark.parametrize("size", [(100, 64), (64, 0), (-32, 64), (4096, 64), (10**30, 64)])
def test_a_size_the_engine_cannot_run_lists_the_nearest(plain: Running, size: tuple[int, int]) -> None:
    answer = plain.generate(width=size[0], height=size[1])
    assert answer.json()["code"] == "invalid_size"
    assert fault_fields(answer) == ["width x height"]
    nearest = re.search(r"nearest: (.+)", answer.json()["detail"])
    assert nearest is not None
    width, height = nearest.group(1).split(", ")[0].split("x")
    assert plain.generate(width=int(width), height=int(height)).status_code == 200


def test_unknown_fields_are_named_with_the_likely_one(plain: Running) -> None:
    answer = plain.generate(num_image=2, colour="red")
    assert fault_fields(answer) == ["num_image", "colour"]
    assert "did you mean num_images?" in answer.json()["detail"]


def test_all_faults_of_a_body_come_at_once(plain: Running) -> None:
    answer = plain.client.post("/generate", json={"seed": "x", "strength": 2})
    assert sorted(fault_fields(answer)) == ["prompt", "seed", "strength"]


@pytest.mark.parametrize("body", ["", "{", "[]", '"text"', "null", '{"prompt": "\\ud800"}', b"\xff{}"])
def test_a_body_that_is_no_json_object_is_refused(plain: Running, body: str | bytes) -> None:
    answer = plain.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert fault_fields(answer)[0] in ("body", "prompt")


def test_long_values_are_not_repeated(plain: Running) -> None:
    answer = plain.generate("secret " * 1000)
    assert "7000 characters" in answer.text
    assert "secret" not in answer.text


def test_conditioning_the_engine_lacks_is_refused_with_the_remedy(serve: Serve) -> None:
    running = serve(FakeEngine(conditioning=frozenset({"text", "image"})))
    upload = b64(image_file(stripes()))
    assert running.generate(image=upload).status_code == 200
    answer = running.generate(control_image=upload)
    assert fault_fields(answer) == ["control_image"]
    assert "ControlNet" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("image/png", False),
        ("application/json", True),
        ("application/json, text/plain, */*", True),
        ("Application/JSON;q=0.5", True),
        ("application/json;q=0", False),
        ("image/png, application/json;q=0.9", False),
        ("image/*;q=0.5, application/json", True),
    ],
)
def test_accept(accept: str, expected: bool) -> None:
    assert prefers_json(accept) is expected
