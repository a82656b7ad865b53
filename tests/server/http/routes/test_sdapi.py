"""/sdapi/v1 as webuiapi and Open WebUI use it: images equal those of /generate; answers name ignored fields."""

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pybase64
import pytest
from running_server import GatedEngine, Running, Serve, image_file, read_image, wait_until

from engines.fake import expected_pixels
from engines.types import Job, Pixels

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / ".venvs" / "clients" / "bin" / "python"
IMAGE: Pixels = (np.arange(40 * 30 * 3).reshape(40, 30, 3) % 253).astype(np.uint8)
LOOK = {"prompt": "a blue square", "width": 64, "height": 96, "seed": 5}


def job(seed: int = 5, **fields: Any) -> Job:
    return Job("a blue square", seed=seed, width=64, height=96, **fields)


def shows(b64: str, expected: Job) -> None:
    np.testing.assert_array_equal(read_image(pybase64.b64decode(b64)), expected_pixels(expected))


def text_of(image: Pixels) -> str:
    return pybase64.b64encode(image_file(image)).decode()


def post(running: Running, path: str = "txt2img", **body: Any) -> httpx.Response:
    return running.client.post(f"/sdapi/v1/{path}", json=LOOK | body)


def info_of(answer: httpx.Response) -> dict[str, Any]:
    answer.raise_for_status()
    found: dict[str, Any] = json.loads(answer.json()["info"])
    return found


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(compat=("sdapi",))


def test_it_is_not_there_unless_asked_for(plain: Running) -> None:
    assert post(plain).status_code == 404
    assert not any("sdapi" in path for path in plain.client.get("/openapi.json").json()["paths"])


def test_images_equal_those_of_generate(running: Running) -> None:
    answer = post(running, batch_size=2, n_iter=2)
    images = answer.json()["images"]
    for i, b64 in enumerate(images):
        shows(b64, job(5 + i))
        again = running.generate("a blue square", width=64, height=96, seed=5 + i)
        assert pybase64.b64decode(b64) == again.content
    info = info_of(answer)
    assert info["all_seeds"] == [5, 6, 7, 8]
    assert (info["width"], info["height"], info["steps"], info["sd_model_name"]) == (64, 96, 1, "fake")
    assert info["infotexts"][1].endswith("CFG scale: 4.5, Seed: 6, Size: 64x96, Model: fake")
    assert answer.json()["parameters"]["batch_size"] == 2
    assert "total;dur=" in answer.headers["server-timing"]


def test_what_has_no_meaning_is_taken_and_named(running: Running) -> None:
    answer = post(running, negative_prompt="ugly", sampler_name="Euler a", eta=0.5, styles=[], tiling=None, steps=20)
    info = info_of(answer)
    assert info["ignored"] == ["eta", "negative_prompt", "sampler_name", "styles"]
    assert info["changed"] == {"steps": {"asked": 20, "used": 1}}
    shows(answer.json()["images"][0], job())
    changed = info_of(post(running, cfg_scale=30, steps=4))
    assert changed["changed"] == {"cfg_scale": {"asked": 30.0, "used": 10.0}}
    assert info_of(post(running, alwayson_scripts={"ADetailer": {"args": [False]}}, override_settings={"x": 1}))[
        "ignored"
    ] == ["alwayson_scripts.ADetailer", "override_settings.x"]


def test_steps_and_guidance_that_the_model_has_are_kept(running: Running) -> None:
    shows(post(running, steps=3, cfg_scale=6.5).json()["images"][0], job(steps=3, guidance_scale=6.5))


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("txt2img", {"prompt": ""}, "prompt"),
        ("txt2img", {"width": 100}, "width x height"),
        ("txt2img", {"batch_size": 4, "n_iter": 4}, "batch_size"),
        ("txt2img", {"script_name": "X/Y/Z plot"}, "script_name"),
        ("txt2img", {"alwayson_scripts": 7}, "alwayson_scripts"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": 7}]}}}, "alwayson_scripts.controlnet"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "v1-5"}}, "sd_model_checkpoint"),
        ("txt2img", {"override_settings": {"samples_format": "gif"}}, "samples_format"),
        ("img2img", {}, "init_images"),
        ("img2img", {"init_images": []}, "init_images"),
        ("img2img", {"init_images": "x"}, "init_images"),
        ("img2img", {"init_images": [7]}, "init_images"),
        ("img2img", {"init_images": ["x"], "mask": "x"}, "mask"),
    ],
)
def test_what_cannot_be_done_is_refused(running: Running, path: str, body: dict[str, Any], field: str) -> None:
    answer = post(running, path, **body)
    assert answer.status_code == 422, answer.text
    assert [fault["field"] for fault in answer.json()["errors"]] == [field]


def test_an_image_is_changed_and_keeps_its_shape(running: Running) -> None:
    fields = {"init_images": [text_of(IMAGE)], "denoising_strength": 0.25}
    shows(post(running, "img2img", **fields).json()["images"][0], job(image=IMAGE, strength=0.25))
    free = running.client.post("/sdapi/v1/img2img", json={"prompt": "x", **fields})
    info = info_of(free)
    assert info["height"] > info["width"]
    assert "init_images" not in free.json()["parameters"]


def test_a_controlnet_unit_is_a_control_image(running: Running) -> None:
    unit = {"image": text_of(IMAGE), "weight": 0.5, "module": "none", "enabled": True}
    off = {**unit, "enabled": False}
    answer = post(running, alwayson_scripts={"ControlNet": {"args": [off, unit]}})
    shows(answer.json()["images"][0], job(control_image=IMAGE, control_scale=0.5))
    assert post(running, alwayson_scripts={"ControlNet": {"args": [unit, unit]}}).status_code == 422
    for none in ({"args": [7]}, {"args": 7}, {}, 7, None):
        shows(post(running, alwayson_scripts={"controlnet": none}).json()["images"][0], job())


@pytest.mark.parametrize(("name", "magic"), [("jpg", b"\xff\xd8"), ("webp", b"RIFF"), ("png", b"\x89PNG")])
def test_the_format_is_that_of_the_settings(running: Running, name: str, magic: bytes) -> None:
    answer = post(running, override_settings={"samples_format": name}, send_images=True)
    assert pybase64.b64decode(answer.json()["images"][0]).startswith(magic)
    assert post(running, send_images=False).json()["images"] == []


def test_a_password_is_a_key(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    running = serve(compat=("sdapi",), api_key_file=str(tmp_path / "keys"))
    for headers, status in (
        ({}, 401),
        ({"authorization": "Basic"}, 401),
        ({"authorization": "Basic !!"}, 401),
        ({"authorization": "Basic " + pybase64.b64encode(b"me:wrong").decode()}, 401),
        ({"authorization": "Basic " + pybase64.b64encode(b"me:right").decode()}, 200),
        ({"authorization": "Bearer right"}, 200),
    ):
        assert running.client.get("/sdapi/v1/options", headers=headers).status_code == status
    basic = {"authorization": "Basic " + pybase64.b64encode(b"me:right").decode()}
    assert running.client.get("/v1/models", headers=basic).status_code == 401  # no client of this API needs Basic


def test_interrupt_ends_the_callers_requests_alone(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine, compat=("sdapi",), max_batch=1)
    engine.gate.clear()
    first = running.submit_generate("first")  # the engine is busy with it
    engine.wait_for_batch()
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, key: str) -> None:
        headers = {"authorization": key}
        answers[name] = running.client.post("/sdapi/v1/txt2img", json=LOOK, headers=headers)

    threads = [threading.Thread(target=ask, args=(name, name)) for name in ("mine", "other")]
    for thread in threads:
        thread.start()
    running.wait_for_queued(2)
    progress = running.client.get("/sdapi/v1/progress").json()
    assert progress["state"]["job_count"] == 2
    assert 0 < progress["progress"] < 1
    assert running.client.post("/sdapi/v1/interrupt", headers={"authorization": "mine"}).json() == {}
    wait_until(lambda: "mine" in answers, "the answer of the interrupted request")
    assert answers["mine"].json()["images"] == []
    assert info_of(answers["mine"])["interrupted"] is True
    engine.gate.set()
    for thread in threads:
        thread.join()
    shows(answers["other"].json()["images"][0], job())
    assert first.result().status_code == 200
    idle = running.client.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)


def test_other_settings_are_taken_and_named(running: Running) -> None:
    present = running.client.get("/sdapi/v1/options").json()
    answer = running.client.post("/sdapi/v1/options", json=present | {"samples_format": "jpg", "new": 1})
    assert answer.json() == {"ignored": ["new", "samples_format"]}
    assert running.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5"}).status_code == 422
    assert running.client.post("/sdapi/v1/options", json=[]).status_code == 422
    assert running.client.get("/sdapi/v1/options").json() == present


@pytest.mark.parametrize("extra", [{}, {"steps": 50, "negative_prompt": "ugly", "sampler_name": "DPM++ 2M"}])
def test_what_open_webui_asks(running: Running, extra: dict[str, Any]) -> None:
    """Requests in the order of open-webui/open-webui, backend/open_webui/routers/images.py, engine `automatic1111`."""
    headers = {"authorization": "Basic"}
    present = running.client.get("/sdapi/v1/options", headers=headers).json()
    assert [(one["title"], one["model_name"]) for one in running.client.get("/sdapi/v1/sd-models").json()] == [
        (present["sd_model_checkpoint"], "fake")
    ]
    running.client.post("/sdapi/v1/options", json=present, headers=headers).raise_for_status()
    data = {"prompt": "a blue square", "batch_size": 2, "width": 512, "height": 512} | extra
    answer = running.client.post("/sdapi/v1/txt2img", json=data, headers=headers)
    found = json.loads(answer.json()["info"])
    for b64, seed in zip(answer.json()["images"], found["all_seeds"], strict=True):
        assert "," not in b64
        shows(b64, Job("a blue square", seed=seed, width=512, height=512))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="needs the clients: make clients")
def test_webuiapi(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    (tmp_path / "image.png").write_bytes(image_file(IMAGE))
    running = serve(compat=("sdapi",), api_key_file=str(tmp_path / "keys"))
    where = urlsplit(running.url)
    program = ROOT / "tests" / "helpers" / "programs" / "with_webuiapi.py"
    done = subprocess.run(
        [PYTHON, program, str(where.hostname), str(where.port), tmp_path / "image.png"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"no_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for i, b64 in enumerate(found["generated"]):
        shows(b64, job(5 + i))
    assert (len(found["generated"]), found["seeds"]) == (2, [5, 6])
    assert {"negative_prompt", "sampler_name", "scheduler", "enable_hr"} <= set(found["ignored"])
    shows(found["edited"][0], job(image=IMAGE, strength=0.25))
    shows(found["drawn"][0], job(control_image=IMAGE, control_scale=0.5))
    assert found["model"] == "fake"
    assert "width x height" in found["refused"]
    assert found["samplers"] == 401
