"""clients/python against a real server: its README's examples run, and what it promises of retries and streams."""

import asyncio
import base64
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running_server import GatedEngine, Running, Serve, image_file, read_image, wait_until
from sana_sprint_client import AsyncClient, Client, ConnectionFailedError, GenerationError, Image, Retries

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, Pixels
from server.generation.model_engines import ModelEngines

ROOT = Path(__file__).parents[3]
README = ROOT / "clients" / "python" / "README.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
DRAWING: Pixels = (np.arange(40 * 30 * 3).reshape(40, 30, 3) % 253).astype(np.uint8)
SMALL: dict[str, Any] = {"width": 64, "height": 64}


def job(seed: int, prompt: str = "a circle", **fields: Any) -> Job:
    return Job(prompt, seed=seed, width=64, height=64, **fields)


def shows(image: Image, wanted: Job) -> None:
    np.testing.assert_array_equal(read_image(image.content), expected_pixels(wanted))


def test_the_examples_of_the_readme_run(
    plain: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = PYTHON.findall(README.read_text())
    assert len(examples) == 4
    for example in examples:
        assert ADDRESS in example
        exec(compile(example.replace(ADDRESS, plain.url), str(README), "exec"), {"__name__": "__main__"})
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["blue.png", "circle.png", *(f"triangles-{seed}.jpg" for seed in range(20, 24))]
    said = capsys.readouterr().out
    assert said.startswith("7 256 256 ")
    assert "422 invalid_size\nwidth x height: got 100x256" in said


def test_the_example_of_the_main_readme_runs(plain: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = PYTHON.findall((ROOT / "README.md").read_text())
    (example,) = [example for example in examples if "sana_sprint_client" in example]
    exec(compile(example.replace(ADDRESS, plain.url), "README.md", "exec"), {})
    assert len(list(tmp_path.glob("triangles-*.png"))) == 4
    assert (tmp_path / "circle.png").exists()


def test_an_image_is_that_of_generate(plain: Running) -> None:
    with Client(plain.url) as client:
        image = client.generate("a circle", seed=7, control_image=image_file(DRAWING), control_scale=0.5, **SMALL)
        assert client.info()["checkpoint"] == "fake"
    shows(image, job(7, control_image=DRAWING, control_scale=0.5))
    assert (image.seed, image.width, image.height, image.format) == (7, 64, 64, "png")
    assert image.content == plain.generate("a circle", seed=7, control_image=_text(DRAWING), control_scale=0.5).content


def _text(pixels: Pixels) -> str:
    return base64.b64encode(image_file(pixels)).decode()


def test_a_server_of_several_models_is_told_which(serve: Serve) -> None:
    engines = {name: FakeEngine(checkpoint=name) for name in ("one", "two")}
    running = serve(ModelEngines(engines), model="one,two")
    with Client(running.url) as client:
        image = client.generate("a circle", seed=5, model="two", **SMALL)
    np.testing.assert_array_equal(read_image(image.content), expected_pixels(job(5), "two"))


def test_the_decoder_is_sent(serve: Serve) -> None:
    with Client(serve(FakeEngine(fast_decoder="taesana")).url) as client:
        shows(client.generate("a circle", seed=7, decoder="fast", **SMALL), job(7, decoder="fast"))


def test_a_stream_yields_what_is_ready_before_what_is_not(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine, max_batch=1)
    engine.gate.clear()
    seen: list[Image] = []
    with Client(running.url) as client:

        def read() -> None:
            seen.extend(client.stream("a circle", 3, seed=5, **SMALL))

        reader = threading.Thread(target=read)
        reader.start()
        running.wait_for_queued(2)  # all three are at the server at once
        engine.gate.set()
        reader.join()
    assert sorted(image.seed for image in seen) == [5, 6, 7]
    for image in seen:
        shows(image, job(image.seed))


def test_a_stream_that_is_left_drops_the_rest(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine, max_batch=1)

    async def leave() -> int:
        async with AsyncClient(running.url) as client:
            stream = client.stream("a circle", 4, **SMALL)
            first = await anext(stream)
            engine.gate.clear()
            await stream.aclose()  # type: ignore[attr-defined]  # an async generator
            return first.seed

    engine.gate.set()
    assert asyncio.run(leave()) >= 0
    wait_until(lambda: running.service.scheduler.in_flight <= 1, "the rest to be dropped")
    engine.gate.set()


def test_the_asynchronous_client_makes_the_same(plain: Running) -> None:
    async def make() -> list[Image]:
        async with AsyncClient(plain.url) as client:
            one = await client.generate("a circle", seed=1, **SMALL)
            return [one, *[image async for image in client.stream("a circle", 2, seed=1, **SMALL)]]

    first, *rest = asyncio.run(make())
    shows(first, job(1))
    assert sorted(image.seed for image in rest) == [1, 2]


def test_errors_say_what_the_server_said(plain: Running) -> None:
    with Client(plain.url) as client, pytest.raises(GenerationError) as caught:
        client.generate("")
    assert (caught.value.status, caught.value.code) == (422, "invalid_value")
    assert caught.value.field_errors[0].field == "prompt"
    assert caught.value.request_id
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1:9"), Client("http://127.0.0.1:9") as nobody:
        nobody.generate("a circle")
    with Client(plain.url) as client, pytest.raises(ValueError, match="count: got 0"):
        next(client.stream("a circle", 0))


def test_an_api_key_is_sent(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    running = serve(FakeEngine(), api_key_file=str(tmp_path / "keys"))
    with Client(running.url, api_key="right") as client:
        shows(client.generate("a circle", seed=1, **SMALL), job(1))
    with Client(running.url, api_key="wrong") as client, pytest.raises(GenerationError, match="401 invalid_api_key"):
        client.generate("a circle")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_server_is_asked_again_when_it_says(asynchronous: bool) -> None:
    """429 and 503 with Retry-After: 0 are asked again; the answer after them is taken."""
    answers = [(429, "0"), (503, "0"), (418, "")]
    asked: list[int] = []

    class Full(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, after = answers[min(len(asked), 2)]
            asked.append(status)
            self.send_response(status)
            self.send_header("retry-after", after)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Full) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"

        async def ask() -> None:
            async with AsyncClient(url) as client:
                await client.generate("a circle")

        def ask_at_once() -> None:
            with Client(url) as client:
                client.generate("a circle")

        try:
            with pytest.raises(GenerationError, match="418"):
                asyncio.run(ask()) if asynchronous else ask_at_once()
        finally:
            server.shutdown()
            thread.join()
    assert asked == [429, 503, 418]


@pytest.mark.parametrize(
    ("attempt", "status", "after", "low", "high"),
    [
        (1, 429, "2", 2.0, 2.0),
        (4, 503, "30", 30.0, 30.0),
        (1, 503, None, 0.25, 0.5),
        (3, 503, "Fri, 27 Nov 2026 10:00:00 GMT", 1.0, 2.0),
        (5, 429, "1", None, None),
        (1, 429, "31", None, None),
        (1, 500, "1", None, None),
        (1, 200, None, None, None),
    ],
)
def test_pauses(attempt: int, status: int, after: str | None, low: float | None, high: float | None) -> None:
    headers = httpx.Headers({} if after is None else {"retry-after": after})
    pause = Retries().pause(attempt, status, headers)
    assert pause is None if low is None or high is None else pause is not None and low <= pause <= high
