"""OpenAI's routes accept what its clients send, return what they read, and use its error envelope."""

from typing import Any

import httpx
import numpy as np
import pybase64
import pytest
from running_server import Running, image_file, read_image

from engines.fake import expected_pixels
from engines.types import Job, Pixels

JOB = Job("a blue square", seed=5, width=64, height=96)


def generations(running: Running, **body: Any) -> httpx.Response:
    return running.client.post("/v1/images/generations", json={"prompt": "a blue square"} | body)


def pixels_of(item: dict[str, Any]) -> Pixels:
    return read_image(pybase64.b64decode(item["b64_json"]))


def error_of(answer: httpx.Response, status: int = 422) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_answer_has_what_clients_read(plain: Running) -> None:
    answer = generations(plain, n=2, size="64x96", seed=5)
    body = answer.json()
    assert {"created", "data", "output_format", "size", "background", "usage"} <= set(body)
    assert (body["size"], body["output_format"]) == ("64x96", "png")
    assert set(body["usage"]) == {"input_tokens", "input_tokens_details", "output_tokens", "total_tokens"}
    assert set(body["usage"]["input_tokens_details"]) == {"image_tokens", "text_tokens"}  # LiteLLM requires both
    assert [item["seed"] for item in body["data"]] == [5, 6]
    np.testing.assert_array_equal(pixels_of(body["data"][0]), expected_pixels(JOB))
    assert "server-timing" in answer.headers


def test_what_other_clients_send_is_taken(plain: Running) -> None:
    """Bodies of Open WebUI and LiteLLM, and fields of OpenAI that have no effect here."""
    body = generations(
        plain,
        model="dall-e-3",
        n=1,
        size="64x96",
        seed=5,
        response_format="b64_json",
        quality="hd",
        style="vivid",
        background="transparent",
        moderation="low",
        user="someone",
        stream=False,
        output_compression=None,
        partial_images=0,
        something_new={"a": [1]},
    ).json()
    np.testing.assert_array_equal(pixels_of(body["data"][0]), expected_pixels(JOB))


def test_size_auto_is_the_checkpoints_unless_width_and_height_say(plain: Running) -> None:
    assert generations(plain).json()["size"] == "256x256"
    assert generations(plain, size="auto", width=64, height=96).json()["size"] == "64x96"
    assert generations(plain, size=None).json()["size"] == "256x256"


def test_our_own_fields_are_extras(plain: Running) -> None:
    body = generations(plain, size="64x96", seed=5, num_inference_steps=2, guidance_scale=5.0).json()
    job = Job("a blue square", seed=5, width=64, height=96, steps=2, guidance_scale=5.0)
    np.testing.assert_array_equal(pixels_of(body["data"][0]), expected_pixels(job))


def test_format_and_compression(plain: Running) -> None:
    sizes = {}
    for compression in (0, 100):
        body = generations(plain, output_format="jpeg", output_compression=compression, seed=1).json()
        assert body["output_format"] == "jpeg"
        content = pybase64.b64decode(body["data"][0]["b64_json"])
        assert content.startswith(b"\xff\xd8")
        sizes[compression] = len(content)
    assert sizes[0] < sizes[100]


def test_url_is_a_data_uri(plain: Running) -> None:
    (item,) = generations(plain, size="64x96", seed=5, response_format="url").json()["data"]
    kind, content = item["url"].split(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(read_image(pybase64.b64decode(content)), expected_pixels(JOB))


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"size": "100x100"}, "width x height", "invalid_size"),
        ({"size": "big"}, "size", "invalid_size"),
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"stream": True}, "stream", "invalid_value"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"seed": -2}, "seed", "invalid_value"),
    ],
)
def test_bad_values_come_in_the_envelope(plain: Running, body: dict[str, Any], param: str, code: str) -> None:
    error = error_of(generations(plain, **body))
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].startswith(f"{param}: got ")


def edit(running: Running, files: Any, **data: str) -> httpx.Response:
    return running.client.post("/v1/images/edits", files=files, data={"prompt": "a blue square"} | data)


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_an_edit_starts_from_its_image(plain: Running, name: str) -> None:
    image = (np.arange(40 * 30 * 3).reshape(40, 30, 3) % 253).astype(np.uint8)
    answer = edit(
        plain,
        {name: ("x.png", image_file(image), "image/png")},
        size="64x96",
        seed="5",
        strength="0.25",
        n="2",
        model="gpt-image-1",
        input_fidelity="high",
    )
    assert answer.status_code == 200, answer.text
    job = Job("a blue square", seed=5, width=64, height=96, image=image, strength=0.25)
    np.testing.assert_array_equal(pixels_of(answer.json()["data"][0]), expected_pixels(job))
    assert len(answer.json()["data"]) == 2


def test_bad_edits_come_in_the_envelope(plain: Running) -> None:
    upload = ("x.png", image_file(np.zeros((8, 8, 3), dtype=np.uint8)), "image/png")
    assert error_of(edit(plain, {"other": upload}))["param"] == "image"
    assert error_of(edit(plain, [("image[]", upload), ("image[]", upload)]))["param"] == "image"
    assert error_of(edit(plain, {"image": upload, "mask": upload}))["param"] == "mask"
    assert error_of(edit(plain, {"image": ("x.png", b"no image", "image/png")}))["param"] == "image"
    assert error_of(edit(plain, {"image": upload}, seed="x"))["param"] == "seed"
    assert error_of(edit(plain, {"image": upload}, n="nan"))["param"] == "n"
    broken = plain.client.post(
        "/v1/images/edits", content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert error_of(broken)["param"] in ("body", "prompt")
    unbounded = plain.client.post("/v1/images/edits", content=b"", headers={"content-type": "multipart/form-data"})
    assert error_of(unbounded)["param"] == "body"


def test_models_lists_the_one_that_runs(plain: Running) -> None:
    body = plain.client.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"]) == ("fake", "model")
    assert set(model) == {"id", "object", "created", "owned_by"}
