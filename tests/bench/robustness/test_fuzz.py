"""bench.robustness.fuzz: a short campaign finds nothing, a failing server is found, and odd files are as described."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from bench.robustness.fuzz import is_clean, main, server_failures
from bench.robustness.malformed_images import KINDS
from bench.robustness.malformed_requests import frame
from bench.robustness.restarting_server import RestartingServer
from server.errors import InvalidError
from server.generation.image_codec import decode


def test_a_short_campaign_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    # Too short for growth: only the rest is checked.
    counts = ("--images", "40", "--requests", "60", "--sdapi", "60", "--options", "80", "--sessions", "16")
    main([*counts, "--offers", "40"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["campaigns"]
    names = ("images", "requests", "sdapi", "options", "sessions", "offers")
    assert [(entry["name"], entry["wrong"]) for entry in result] == [(name, {}) for name in names]
    assert {"200", "422"} <= set(result[0]["seen"])
    assert {"400", "405"} <= set(result[1]["seen"])
    assert set(result[2]["seen"]) == set(result[3]["seen"]) == {"200", "422"}


@pytest.mark.slow
def test_the_whole_campaign_finds_nothing() -> None:
    counts = ("--images", "5000", "--requests", "5000", "--sdapi", "3000", "--options", "3000", "--sessions", "1000")
    assert main([*counts, "--offers", "1000"]) == 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so and goes on
@pytest.mark.parametrize("kind", KINDS)
def test_files_meet_their_fate(kind: str) -> None:
    make, expected = KINDS[kind]
    for seed in range(3):
        content = make(random.Random(seed))
        assert content == make(random.Random(seed))
        try:
            decode("image", content, 0)
        except InvalidError:
            assert expected != "read"
        else:
            assert expected != "refused"


def test_failures_inside_are_found(tmp_path: Path) -> None:
    async def run() -> dict[str, int]:
        server = RestartingServer(["--backend", "fake"], tmp_path / "log")
        await server.start()
        try:
            await server.exchange("POST", "/generate", b'{"prompt": "[[raise]]", "width": 64, "height": 64}')
            return await server_failures(server)
        finally:
            await server.stop()

    result = asyncio.run(run())
    assert result['sana_sprint_requests_total{route="/generate",status="500"}'] == 1
    assert result["tracebacks in the log"] >= 1


@pytest.mark.parametrize(
    ("growth", "wrong", "clean"),
    [
        ({"memory": 0.01, "files": 0, "threads": 0}, {}, True),
        ({"memory": 0.11, "files": 0, "threads": 0}, {}, False),
        ({"memory": 0.0, "files": 1, "threads": 0}, {}, False),
        ({"memory": 0.0, "files": 0, "threads": 1}, {}, False),
        ({"memory": 0.0, "files": 0, "threads": 0}, {"wrong: 500": 1}, False),
    ],
)
def test_growth_and_failures_decide(growth: dict[str, float], wrong: dict[str, int], clean: bool) -> None:
    assert is_clean({"growth": growth, "wrong": wrong}) == clean


def test_frames_are_masked_and_sized() -> None:
    assert frame(1, b"Hello", b"\x37\xfa\x21\x3d") == bytes.fromhex("818537fa213d7f9f4d5158")  # RFC 6455, 5.7
    assert frame(2, b"x" * 300, None)[:4] == b"\x82\x7e\x01\x2c"
