"""`aspect_ratio` of a request: the size of that name, on every route and in live sessions."""

import base64
import io
from typing import Any

import pytest
from live_client import live
from PIL import Image
from running_server import Running, Serve

from engines.fake import FakeEngine


def size_of(content: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(content)).size


def body(**changes: object) -> dict[str, object]:
    return {"prompt": "a ring", "seed": 7, **changes}


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(FakeEngine())


def test_info_lists_the_sizes_and_generate_makes_them(running: Running) -> None:
    offered: dict[str, list[int]] = running.client.get("/v1/info").json()["aspect_ratios"]
    assert {"1:1", "16:9", "9:16", "4:1"} <= offered.keys()
    for name in ("16:9", "9:16"):
        answer = running.client.post("/generate", json=body(aspect_ratio=name))
        assert size_of(answer.content) == tuple(offered[name])


def test_openai_route_takes_it_as_an_extra_field(running: Running) -> None:
    width, height = running.client.get("/v1/info").json()["aspect_ratios"]["3:2"]
    answer = running.client.post("/v1/images/generations", json=body(aspect_ratio="3:2")).json()
    assert answer["size"] == f"{width}x{height}"
    assert size_of(base64.b64decode(answer["data"][0]["b64_json"])) == (width, height)


def test_an_edit_takes_it_instead_of_the_shape_of_its_image(running: Running) -> None:
    file = io.BytesIO()
    Image.new("RGB", (96, 192)).save(file, "PNG")
    width, height = running.client.get("/v1/info").json()["aspect_ratios"]["2:1"]
    image = base64.b64encode(file.getvalue()).decode()
    answer = running.client.post("/v1/images/edits", json=body(aspect_ratio="2:1", image=image)).json()
    assert answer["size"] == f"{width}x{height}"


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"aspect_ratio": "16:10"}, 'aspect_ratio: got "16:10", this engine runs 1:1, 5:4,'),
        ({"aspect_ratio": "16:9", "width": 64}, 'aspect_ratio: got "16:9" and 64x'),
        ({"aspect_ratio": 1.5}, "aspect_ratio: got 1.5, allowed: a string"),
    ],
)
def test_a_ratio_that_cannot_be_is_refused(running: Running, changes: dict[str, Any], detail: str) -> None:
    answer = running.client.post("/generate", json=body(**changes))
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


def test_an_engine_of_fixed_sizes_names_those_it_has(serve: Serve) -> None:
    running = serve(FakeEngine(sizes=((256, 256), (320, 192))))
    assert running.client.get("/v1/info").json()["aspect_ratios"] == {"1:1": [256, 256], "16:9": [320, 192]}
    answer = running.client.post("/generate", json=body(aspect_ratio="3:2"))
    assert 'aspect_ratio: got "3:2", this engine runs 1:1, 16:9' in answer.json()["detail"]


def test_the_newer_of_ratio_and_size_holds_in_a_live_session(running: Running) -> None:
    offered = running.client.get("/v1/info").json()["aspect_ratios"]
    with live(running) as session:
        wide = session.image_of(session.set(prompt="a ring", aspect_ratio="2:1"))
        assert list(size_of(wide.content)) == offered["2:1"]
        sized = session.image_of(session.set(width=64, height=96))
        assert size_of(sized.content) == (64, 96)
        tall = session.image_of(session.set(aspect_ratio="1:2"))
        assert list(size_of(tall.content)) == offered["1:2"]
