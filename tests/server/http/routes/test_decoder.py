"""`decoder` of a request: every API makes its image by the decoder that the request names."""

import base64
from typing import Any

import numpy as np
import pytest
from running_server import Running, Serve, image_file, read_image

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, Pixels

START = np.full((64, 64, 3), 90, np.uint8)


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(FakeEngine(fast_decoder="taesana"), compat=("sdapi",))


def expected(**fields: Any) -> Pixels:
    return expected_pixels(Job("a red circle", 7, 64, 64, **fields))


def shown(content: str) -> Pixels:
    return read_image(base64.b64decode(content))


@pytest.mark.parametrize("decoder", ["full", "fast"])
def test_every_api_passes_the_decoder_on(running: Running, decoder: str) -> None:
    body = {"prompt": "a red circle", "seed": 7, "width": 64, "height": 64, "decoder": decoder}
    plain, edited = expected(decoder=decoder), expected(decoder=decoder, image=START, strength=0.5)
    assert np.array_equal(read_image(running.client.post("/generate", json=body).content), plain)
    openai = running.client.post("/v1/images/generations", json=body).json()
    assert np.array_equal(shown(openai["data"][0]["b64_json"]), plain)
    form = {name: str(value) for name, value in body.items()}
    answer = running.client.post("/v1/images/edits", data=form, files={"image": image_file(START)}).json()
    assert np.array_equal(shown(answer["data"][0]["b64_json"]), edited)
    start = base64.b64encode(image_file(START)).decode()
    assert np.array_equal(read_image(running.client.post("/generate", json=body | {"image": start}).content), edited)
    automatic = running.client.post("/sdapi/v1/txt2img", json=body).json()
    assert np.array_equal(shown(automatic["images"][0]), plain)
    again = body | {"init_images": [start], "denoising_strength": 0.5}
    automatic = running.client.post("/sdapi/v1/img2img", json=again).json()
    assert np.array_equal(shown(automatic["images"][0]), edited)


def test_full_is_the_default_and_one_decoder_is_told(running: Running, serve: Serve) -> None:
    answer = running.generate(seed=7)
    assert np.array_equal(read_image(answer.content), expected())
    assert running.client.get("/v1/info").json()["decoders"] == {"full": "full", "fast": "taesana"}
    alone = serve()
    assert alone.client.get("/v1/info").json()["decoders"] == {"full": "full"}
    refused = alone.generate(decoder="fast")
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert (error["field"], error["pointer"]) == ("decoder", "#/decoder")
    assert error["detail"].startswith("decoder: got 'fast', loaded: full; give a second one at start")
    body = {"prompt": "a red circle", "decoder": "fast"}
    envelope = alone.client.post("/v1/images/generations", json=body)
    assert (envelope.status_code, envelope.json()["error"]["param"]) == (422, "decoder")


@pytest.mark.parametrize("decoder", ["taesana", "", 1, None, ["fast"]])
def test_another_value_is_refused_with_the_two_names(running: Running, decoder: object) -> None:
    refused = running.generate(decoder=decoder)
    assert refused.status_code == 422
    assert "full" in refused.json()["detail"]
    assert "fast" in refused.json()["detail"]


def test_requests_for_both_decoders_share_a_batch(serve: Serve) -> None:
    engine = FakeEngine(fast_decoder="taesana", delay_s=0.2)
    running = serve(engine)
    first = running.submit_generate("the one that runs meanwhile")
    others = [running.submit_generate(seed=7, decoder=name) for name in ("full", "fast") * 3]
    first.result()
    for number, other in enumerate(others):
        wanted = expected(decoder=("full", "fast")[number % 2])
        assert np.array_equal(read_image(other.result().content), wanted)
    assert max(engine.batches) > 1
