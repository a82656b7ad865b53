"""`lora` of a request, and adapters as models: every result uses the adapters of its own request."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from running_server import Running, Serve

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(FakeEngine(adapters=("ring", "night")))


def expected(**changes: object) -> np.ndarray:
    return expected_pixels(Job("a ring", 7, 64, 64, **changes))  # type: ignore[arg-type]  # as written


def body(**changes: object) -> dict[str, object]:
    return {"prompt": "a ring", "seed": 7, "width": 64, "height": 64, **changes}


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("lora", "reached"),
    [
        (None, ()),
        ({}, ()),
        ({"ring": 0}, ()),
        ({"ring": 1}, (("ring", 1.0),)),
        ({"night": -4, "ring": 0.5}, (("night", -4.0), ("ring", 0.5))),
    ],
)
def test_generate_hands_them_to_the_engine(
    running: Running, lora: object, reached: tuple[tuple[str, float], ...]
) -> None:
    answer = running.client.post("/generate", json=body(lora=lora))
    assert np.array_equal(pixels(answer.content), expected(lora=reached))


@pytest.mark.parametrize(
    ("lora", "detail"),
    [
        ({"rign": 1}, "lora: got 'rign', allowed: ring, night"),
        ({"ring": 4.5}, "lora.ring: got 4.5, allowed: an object whose values are numbers from -4 to 4"),
        ("ring", 'lora: got "ring", allowed: an object whose values are numbers from -4 to 4'),
    ],
)
def test_a_choice_that_cannot_be_names_what_can(running: Running, lora: object, detail: str) -> None:
    answer = running.client.post("/generate", json=body(lora=lora))
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


def test_without_adapters_a_choice_says_how_to_have_them(serve: Serve) -> None:
    answer = serve().client.post("/generate", json=body(lora={"ring": 1}))
    assert answer.status_code == 422
    assert "--lora NAME=PATH" in answer.json()["detail"]


def test_openai_clients_choose_one_as_a_model(running: Running) -> None:
    listed = [one["id"] for one in running.client.get("/v1/models").json()["data"]]
    assert listed == ["fake", "fake:ring", "fake:night"]
    assert running.client.get("/v1/models/fake:ring").json()["id"] == "fake:ring"
    for model, reached in (("fake:ring", (("ring", 1.0),)), ("fake", ()), ("gpt-image-1", ())):
        answer = running.client.post("/v1/images/generations", json=body(model=model))
        assert np.array_equal(pixels(base64.b64decode(answer.json()["data"][0]["b64_json"])), expected(lora=reached))


def test_lora_says_the_scale_of_the_model_that_was_chosen(running: Running) -> None:
    answer = running.client.post("/v1/images/generations", json=body(model="fake:ring", lora={"ring": 0.5}))
    result = pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert np.array_equal(result, expected(lora=(("ring", 0.5),)))


def test_an_adapter_that_is_not_there_is_no_model(running: Running) -> None:
    answer = running.client.post("/v1/images/generations", json=body(model="fake:rign"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "fake:ring" in answer.json()["error"]["message"]


def test_a_form_writes_it_as_json(running: Running) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    fields = {"prompt": "a ring", "seed": "7", "size": "64x64", "strength": "1", "lora": '{"ring": 1}'}
    answer = running.client.post("/v1/images/edits", data=fields, files={"image": ("a.png", file.getvalue())})
    result = pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    start = np.zeros((64, 64, 3), np.uint8)
    assert np.array_equal(result, expected(lora=(("ring", 1.0),), image=start, strength=1.0))


def test_info_lists_them(running: Running) -> None:
    assert running.client.get("/v1/info").json()["adapters"] == ["ring", "night"]
