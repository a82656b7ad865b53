"""The page with the shipped checkpoint, in a real Chromium: what a user sees, and its latency.

python -m pytest -m slow tests/server/http/routes/test_page_tiny.py -s --basetemp FOLDER  # screenshots stay in FOLDER
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, browser, executable
from program import serving

STROKES = 40
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--log-level", "warning") as address:
        yield address


def arc(radius: float, start: int, end: int) -> list[tuple[float, float]]:
    """Returns points on a circle around the centre of the sketch, from `start` to `end` in 40ths of a turn."""
    turns = [index / STROKES * 2 * math.pi for index in range(start, end + 1)]
    return [(0.5 + radius * math.cos(turn), 0.5 + radius * math.sin(turn)) for turn in turns]


def settled(page: Page) -> None:
    page.until("document.body.dataset.state === 'live' && !document.body.hasAttribute('data-stale')")


@pytest.mark.slow
@pytest.mark.skipif(executable() is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_from_the_pen_to_the_image(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.view(1280, 800)
        page.go(url + "/")
        settled(page)
        page.run("document.getElementById('prompt').focus(), document.getElementById('prompt').select()")
        page.type(PROMPT)
        settled(page)
        waits = []
        for index in range(STROKES):  # a circle in pieces; the image settles after each
            page.stroke("#sketch", arc(0.25, index, index + 1))
            settled(page)
            waits.append(int(page.text("#latency")))
        for name, phone, dark in (("desktop", False, False), ("desktop-dark", False, True), ("phone", True, False)):
            page.view(*((390, 844) if phone else (1280, 800)), phone=phone, dark=dark)
            settled(page)
            page.screenshot(tmp_path / f"page-{name}.png")
        assert page.console_errors == []
    print(
        "\n"
        + json.dumps(
            {
                "strokes": len(waits),
                "pen_to_image_ms": {"median": statistics.median(waits), "largest": max(waits)},
                "screenshots": sorted(path.name for path in tmp_path.glob("*.png")),
            }
        )
    )
    assert min(waits) > 0
