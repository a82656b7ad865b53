"""--safety over HTTP and live: flagged prompts and images get 422, failed checks 503, and no image leaks."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pybase64
import pytest
import stand_in_checkers
from live_client import live
from running_server import PATIENCE_S, GatedEngine, Running, Serve, image_file, read_image
from stand_in_checkers import digest

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, RawImage
from server.generation.safety.guard import shown_pixels

TOGETHER = 16
LOOK = {"width": 64, "height": 64}


def job(prompt: str, seed: int = 7, **fields: Any) -> Job:
    return Job(prompt, seed=seed, width=64, height=64, **fields)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder on sys.path with the stand-in checkers."""
    stand_in_checkers.install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def listed(folder: Path, *jobs: Job) -> tuple[str, str]:
    """Returns --safety image=..., which flags the images of these jobs."""
    file = folder / "digests"
    file.write_text("\n".join(digest(expected_pixels(one)) for one in jobs))
    return "image", f"listed:{file}"


def words(folder: Path, *lines: str) -> tuple[str, str]:
    file = folder / "words"
    file.write_text("\n".join(lines))
    return "prompt", str(file)


def refused(answer: httpx.Response, what: str) -> str:
    """Returns the sentence of a refusal, which holds text alone."""
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    error = answer.json()
    assert (error["code"], [fault["field"] for fault in error["errors"]]) == ("content_policy_violation", [what])
    assert len(answer.content) < 1000
    detail: str = error["detail"]
    return detail


@pytest.mark.parametrize(("harmless", "half"), [(100, 10), pytest.param(1000, 100, marks=pytest.mark.slow)])
def test_harmless_and_flagged_requests_at_once(serve: Serve, packages: Path, harmless: int, half: int) -> None:
    """Flags half by their prompts, half by their images: each verdict is right and no image leaks."""
    plain = [job(f"a circle, number {i}") for i in range(harmless)]
    by_word = [job(f"a gory circle, number {i}") for i in range(half)]
    by_image = [job(f"a square, number {i}") for i in range(half)]
    running = serve(safety=(words(packages, "gory"), listed(packages, *by_image)))
    cases = (
        [(one, "200") for one in plain] + [(one, "prompt") for one in by_word] + [(one, "image") for one in by_image]
    )
    order = np.random.default_rng(0).permutation(len(cases))
    seen: Counter[tuple[str, str]] = Counter()

    async def client(numbers: list[int], http: httpx.AsyncClient) -> None:
        for number in numbers:
            one, expected = cases[number]
            answer = await http.post("/generate", json={"prompt": one.prompt, "seed": one.seed} | LOOK)
            if answer.status_code == 200:
                np.testing.assert_array_equal(read_image(answer.content), expected_pixels(one))
                got = "200"
            else:
                refused(answer, expected)
                got = expected
            seen[expected, got] += 1

    async def all_clients() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as http:
            await asyncio.gather(*(client([int(i) for i in order[k::TOGETHER]], http) for k in range(TOGETHER)))

    asyncio.run(all_clients())
    assert seen == {("200", "200"): harmless, ("prompt", "prompt"): half, ("image", "image"): half}
    checks = "sana_sprint_safety_checks_total"
    assert running.metric(checks, what="prompt", verdict="refused") == half
    assert running.metric(checks, what="prompt", verdict="allowed") == harmless + half
    assert running.metric(checks, what="image", verdict="refused") == half
    assert running.metric(checks, what="image", verdict="allowed") == harmless
    assert running.metric("sana_sprint_safety_check_duration_seconds_count", what="image") == harmless + half
    assert running.metric("sana_sprint_images_total", width="64", height="64", steps="1") == harmless


def test_a_prompt_is_refused_before_it_costs_the_engine_anything(serve: Serve, packages: Path) -> None:
    engine = GatedEngine()
    running = serve(engine, safety=(words(packages, "gore"),))
    before = len(engine.seen)
    detail = refused(running.generate("a circle of gore"), "prompt")
    assert detail == "prompt: refused by this server's content policy: 'gore' stands on this server's list of words"
    assert len(engine.seen) == before


def test_one_flagged_image_refuses_all_of_its_request(serve: Serve, packages: Path) -> None:
    running = serve(safety=(listed(packages, job("a circle", 9)),))
    assert "it is listed; another prompt or seed may do" in refused(
        running.generate("a circle", seed=7, num_images=4), "image"
    )
    assert running.generate("a circle", seed=7, num_images=2).status_code == 200
    assert running.generate("a circle", seed=10, num_images=4).status_code == 200


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_no_format_is_a_way_around(serve: Serve, packages: Path, image_format: str) -> None:
    running = serve(safety=(listed(packages, job("a circle")),))
    refused(running.generate("a circle", seed=7, output_format=image_format), "image")


def test_the_cost_is_told(serve: Serve, packages: Path) -> None:
    running = serve(safety=(words(packages, "gore"), listed(packages)))
    answer = running.generate("a circle", num_images=2)
    timings = answer.json()["timings_ms"]
    assert 0 < timings["safety"] < timings["total"]
    assert ", safety;dur=" in answer.headers["server-timing"]
    assert running.client.get("/v1/info").json()["safety"] == {
        "prompt": str(packages / "words"),
        "image": f"listed:{packages / 'digests'}",
    }


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
@pytest.mark.parametrize("what", ["prompt", "image"])
def test_openai_routes_have_their_envelope(serve: Serve, packages: Path, path: str, what: str) -> None:
    """Answers with OpenAI's code `content_policy_violation`."""
    image = np.full((64, 64, 3), 40, np.uint8)
    source = image if path.endswith("edits") else None
    flagged = job("a circle", image=source, strength=0.5)
    running = serve(safety=(words(packages, "gore"), listed(packages, flagged)))
    body: dict[str, Any] = {"prompt": "gore" if what == "prompt" else "a circle", "seed": 7, "size": "64x64"}
    if source is not None:
        body["image"] = pybase64.b64encode(image_file(image)).decode()
    answer = running.client.post(path, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("content_policy_violation", "invalid_request_error", what)
    assert running.client.post(path, json=body | {"prompt": "a circle", "seed": 8}).status_code == 200


@pytest.mark.parametrize("checker", ["prompt=broken", "image=broken", "image=wordless"])
@pytest.mark.usefixtures("packages")
def test_a_checker_that_fails_shows_nothing(serve: Serve, checker: str, caplog: pytest.LogCaptureFixture) -> None:
    what, _, name = checker.partition("=")
    running = serve(safety=((what, name),))
    for answer in (
        running.generate("a secret circle"),
        running.client.post("/v1/images/generations", json={"prompt": "a secret circle", "size": "64x64"}),
    ):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        error = answer.json()
        assert error.get("code", error.get("error", {}).get("code")) == "safety_check_failed"
    assert running.metric("sana_sprint_safety_checks_total", what=what, verdict="failed") == 2
    assert running.client.get("/health/ready").status_code == 200
    assert f"the checker of the {what} failed" in caplog.text
    assert "secret" not in caplog.text


def test_live_drawing_is_checked_too(serve: Serve, packages: Path) -> None:
    running = serve(safety=(words(packages, "gore"), listed(packages, job("a square"))))
    with live(running) as client:
        client.set(prompt="a circle of gore", seed=7, output_format="png", **LOOK)
        error = client.expect_message("error")
        assert (error["status"], error["code"], error["errors"][0]["field"]) == (
            422,
            "content_policy_violation",
            "prompt",
        )
        client.set(prompt="a square")
        error = client.expect_message("error")
        assert (error["code"], error["errors"][0]["field"]) == ("content_policy_violation", "image")
        shown = client.image_of(client.set(prompt="a circle"))  # the session continues
        np.testing.assert_array_equal(shown.pixels, expected_pixels(job("a circle")))


@pytest.mark.usefixtures("packages")
def test_live_drawing_shows_nothing_where_a_checker_fails(serve: Serve) -> None:
    with live(serve(safety=(("image", "broken"),))) as client:
        client.set(prompt="a circle", **LOOK)
        error = client.expect_message("error")
        assert (error["status"], error["code"]) == (503, "safety_check_failed")


def test_a_file_that_the_engine_made_is_read_back() -> None:
    pixels = np.full((8, 16, 3), (200, 30, 30), np.uint8)
    stages = FakeEngine().generate([job("x")])[0].stages
    result = RawImage(np.zeros((0, 0, 3), np.uint8), stages, 1, file=image_file(pixels, "JPEG", quality=95))
    seen = shown_pixels(result)
    assert seen.shape == pixels.shape
    assert np.abs(seen.astype(int) - pixels).max() < 8


def test_without_safety_nothing_is_checked_or_told(plain: Running) -> None:
    answer = plain.generate("gore", num_images=2)
    assert answer.status_code == 200
    assert "safety" not in answer.json()["timings_ms"]
    assert "sana_sprint_safety_checks_total{" not in plain.client.get("/metrics").text
    assert plain.client.get("/v1/info").json()["safety"] is None
