"""`model` of a request, on every API: that model makes the image, and an unknown name tells what is there."""

import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from live_client import live
from running_server import Running, Serve, read_image, start

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, Pixels
from server.generation.model_engines import ModelEngines

LOOK = {"prompt": "a red circle", "seed": 7, "width": 64, "height": 64}
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def running() -> Any:
    """Serves two models; the second is smaller and has an adapter."""
    with ExitStack() as stack:
        one = FakeEngine(checkpoint="one")
        two = FakeEngine(checkpoint="two", adapters=("ring",), default_size=(96, 96), max_batch=2)
        yield start(stack, ModelEngines({"one": one, "two": two}), model="one,two", compat=("sdapi",))


def expected(model: str, **fields: Any) -> Pixels:
    return expected_pixels(Job("a red circle", 7, 64, 64, **fields), model)


def as_pixels(text: str) -> Pixels:
    return read_image(base64.b64decode(text))


@pytest.mark.parametrize(("fields", "made_by"), [({}, "one"), ({"model": "one"}, "one"), ({"model": "two"}, "two")])
def test_generate(running: Running, fields: dict[str, str], made_by: str) -> None:
    answer = running.client.post("/generate", json=LOOK | fields, headers={"accept": "application/json"}).json()
    assert answer["model"] == made_by
    np.testing.assert_array_equal(as_pixels(answer["images"][0]["b64"]), expected(made_by))


def test_the_defaults_and_adapters_are_those_of_the_model(running: Running) -> None:
    plain = {"prompt": "a red circle", "seed": 7}
    assert read_image(running.client.post("/generate", json=plain).content).shape == (256, 256, 3)
    assert read_image(running.client.post("/generate", json=plain | {"model": "two"}).content).shape == (96, 96, 3)
    adapted = running.client.post("/generate", json=LOOK | {"model": "two", "lora": {"ring": 1}})
    np.testing.assert_array_equal(read_image(adapted.content), expected("two", lora=(("ring", 1.0),)))
    refused = running.client.post("/generate", json=LOOK | {"model": "one", "lora": {"ring": 1}})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "lora")


@pytest.mark.parametrize("name", ["three", "two:ring", "", "x" * 4000])
def test_an_unknown_model_is_told_what_is_there(running: Running, name: str) -> None:
    answer = running.client.post("/generate", json=LOOK | {"model": name})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "model")
    assert answer.json()["detail"].endswith("allowed: one, two")
    assert len(answer.json()["detail"]) < 200


def test_a_server_of_one_model_knows_its_name_alone(plain: Running) -> None:
    assert plain.generate(model="fake").status_code == 200
    answer = plain.generate(model="dall-e-3")
    assert (answer.status_code, answer.json()["detail"]) == (422, "model: got 'dall-e-3', allowed: fake")
    assert list(plain.client.get("/v1/info").json()["models"]) == ["fake"]


def test_info_and_models_list_them(running: Running) -> None:
    info = running.client.get("/v1/info").json()
    assert (info["checkpoint"], info["default_size"], list(info["models"])) == ("one", [256, 256], ["one", "two"])
    two = info["models"]["two"]
    assert (two["checkpoint"], two["default_size"], two["max_batch"], two["adapters"]) == ("two", [96, 96], 2, ["ring"])
    listed = [model["id"] for model in running.client.get("/v1/models").json()["data"]]
    assert listed == ["one", "two", "two:ring"]
    assert running.client.get("/v1/models/two").json()["id"] == "two"
    missing = running.client.get("/v1/models/three")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("model", "made_by", "lora"),
    [(None, "one", ()), ("", "one", ()), ("one", "one", ()), ("two", "two", ()), ("two:ring", "two", (("ring", 1.0),))],
)
def test_openai(running: Running, model: str | None, made_by: str, lora: tuple[tuple[str, float], ...]) -> None:
    body = {"prompt": "a red circle", "seed": 7, "size": "64x64", "model": model}
    answer = running.client.post("/v1/images/generations", json=body)
    np.testing.assert_array_equal(as_pixels(answer.json()["data"][0]["b64_json"]), expected(made_by, lora=lora))


@pytest.mark.parametrize("model", ["gpt-image-1", "one:ring", "two:rign", 7])
def test_openai_with_an_unknown_model(running: Running, model: object) -> None:
    """Another model than the one asked for would be a silent substitute."""
    answer = running.client.post("/v1/images/generations", json=LOOK | {"model": model})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "model_not_found")
    assert error["message"].endswith("allowed: one, two, two:ring")


def test_sdapi(running: Running) -> None:
    assert [entry["title"] for entry in running.client.get("/sdapi/v1/sd-models").json()] == ["one", "two"]
    body = LOOK | {"steps": 1, "override_settings": {"sd_model_checkpoint": "two"}}
    answer = running.client.post("/sdapi/v1/txt2img", json=body).json()
    np.testing.assert_array_equal(as_pixels(answer["images"][0]), expected("two"))
    assert json.loads(answer["info"])["sd_model_name"] == "two"
    for name in ("three", 7):
        refused = running.client.post(
            "/sdapi/v1/txt2img", json=LOOK | {"override_settings": {"sd_model_checkpoint": name}}
        )
        assert (refused.status_code, refused.json()["detail"].endswith("allowed: one, two")) == (422, True)
    options = running.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "two"})
    assert options.status_code == 422
    assert "override_settings" in options.json()["detail"]


def test_live_sessions_switch_models(running: Running) -> None:
    with live(running) as client:
        assert client.ready["models"] == ["one", "two"]
        look = {"width": 64, "height": 64, "seed": 7, "output_format": "png"}
        first = client.image_of(client.set(prompt="a red circle", **look))
        np.testing.assert_array_equal(first.pixels, expected("one"))
        other = client.image_of(client.set(model="two"))
        np.testing.assert_array_equal(other.pixels, expected("two"))
        client.set(model="three")
        assert "allowed: one, two" in client.expect_message("error")["detail"]
        kept = client.image_of(client.set(seed=8))
        np.testing.assert_array_equal(kept.pixels, expected_pixels(Job("a red circle", 8, 64, 64), "two"))


def test_metrics_have_the_model(serve: Serve) -> None:
    engines = {name: FakeEngine(checkpoint=name) for name in NAMES}
    running = serve(ModelEngines(engines), model="one,two")
    running.generate(model="two", num_images=2)
    size = {"width": "64", "height": "64", "steps": "1"}
    assert running.metric("sana_sprint_images_total", model="two", **size) == 2
    assert running.metric("sana_sprint_images_total", model="one", **size) == 0
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="decode", model="two") == 2
    assert running.metric("sana_sprint_batch_size_sum", model="two") == 2
    text = running.client.get("/metrics").text
    assert {f'checkpoint="{name}"' in text for name in NAMES} == {True}


def test_two_hundred_mixed_requests_each_get_their_model(running: Running) -> None:
    rng = random.Random(0)
    orders = [(rng.choice((None, *NAMES)), rng.randrange(100), rng.choice((64, 96))) for _ in range(200)]

    def is_right(order: tuple[str | None, int, int]) -> bool:
        model, seed, side = order
        answer = running.generate(str(seed), seed=seed, width=side, height=side, model=model)
        assert answer.status_code == 200
        wanted = expected_pixels(Job(str(seed), seed, side, side), model or "one")
        return np.array_equal(read_image(answer.content), wanted)

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(is_right, orders)) == 200
