"""The page at / in a real Chromium: drawing, the live image, a lost and a restored connection."""

import base64
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from chromium import Page, browser, executable
from PIL import Image
from running_server import PATIENCE_S, GatedEngine, Running, Serve, wait_until

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, Pixels
from server.generation.model_engines import ModelEngines
from server.http.routes.page import STATIC

ROOT = Path(__file__).resolve().parents[4]
CIRCLE = [(0.5 + 0.3 * math.cos(turn / 8 * math.pi), 0.5 + 0.3 * math.sin(turn / 8 * math.pi)) for turn in range(17)]
needs_browser = pytest.mark.skipif(
    executable() is None, reason="Chromium is not installed (Debian: apt-get install chromium); the page is not driven"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def shown_image(page: Page) -> Pixels:
    """Returns the pixels of the image in the frame."""
    script = """(() => { const image = document.getElementById('picture'), canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL('image/png'); })()"""
    page.until("document.getElementById('picture').complete")
    with Image.open(io.BytesIO(base64.b64decode(page.run(script).partition(",")[2]))) as image:
        return np.array(image.convert("RGB"))


def shown(page: Page) -> str:
    source: str = page.run("document.getElementById('picture').src")
    return source


def settled(page: Page) -> None:
    """Waits until the image shows the newest drawing and settings."""
    page.until("document.body.dataset.state === 'live' && !document.body.hasAttribute('data-stale')")


def strokes(pixels: Pixels) -> float:
    """Returns the share of near-white pixels: the fake engine copies strokes onto its image."""
    return float((pixels.min(axis=2) > 200).mean())


def open_page(page: Page, url: str, *, phone: bool = False) -> None:
    page.go("about:blank")
    page.console_errors.clear()
    page.view(*((390, 844) if phone else (1280, 800)), phone=phone)
    page.go(url + "/")
    settled(page)


@needs_browser
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_the_image_follows_the_pen(page: Page, plain: Running, phone: bool) -> None:
    open_page(page, plain.url, phone=phone)
    assert page.text("#status") == "Live"
    assert page.text("#model") == "fake on none, fake"
    empty = shown_image(page)
    assert strokes(empty) == 0
    page.stroke("#sketch", CIRCLE, touch=phone)
    settled(page)
    assert strokes(shown_image(page)) > 0.01
    assert int(page.text("#latency")) > 0
    before = shown(page)
    page.run("document.getElementById('prompt').focus(), document.getElementById('prompt').select()")
    page.type("a blue square")
    page.until(f"document.getElementById('picture').src !== {before!r}")
    settled(page)
    assert page.run("document.getElementById('picture').alt") == "a blue square"
    page.click("#undo")
    settled(page)
    assert strokes(shown_image(page)) == 0
    wide = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0  # no horizontal overflow
    assert page.console_errors == []


@needs_browser
def test_with_two_decoders_the_full_one_follows_when_the_pen_rests(page: Page, serve: Serve) -> None:
    open_page(page, serve(FakeEngine(fast_decoder="taesana")).url)
    decoder = "document.getElementById('figures').title.split('\\n').at(-1)"
    page.until(f"{decoder} === 'full decoder'")
    page.run(
        f"""window.decoders = []; new MutationObserver(() => window.decoders.push({decoder})).observe(
        document.getElementById('figures'), {{ attributeFilter: ['title'] }})"""
    )
    page.stroke("#sketch", CIRCLE)
    page.until("window.decoders.at(-1) === 'full decoder'")
    settled(page)
    assert page.run("window.decoders[0]") == "fast decoder"
    assert strokes(shown_image(page)) > 0.01
    assert page.console_errors == []


def choose(page: Page, css: str, value: str) -> None:
    """Selects an option of a list, as a person does."""
    page.run(
        f"""(() => {{ const list = document.querySelector({css!r}); list.value = {value!r};
        list.dispatchEvent(new Event('change')); }})()"""
    )


def made_by(page: Page, model: str, side: int) -> bool:
    """Returns whether the shown image is that of the model for the page's prompt and seed."""
    seed = int(page.run("document.getElementById('seed').value"))
    prompt = page.run("document.getElementById('prompt').value")
    expected = expected_pixels(Job(prompt, seed, side, side), model)
    shows = shown_image(page)
    return shows.shape == expected.shape and float(np.abs(shows.astype(int) - expected).mean()) < 3


@needs_browser
def test_with_several_models_a_list_chooses(page: Page, serve: Serve) -> None:
    one, two = FakeEngine(checkpoint="one"), FakeEngine(checkpoint="two", default_size=(96, 96), sizes=((96, 96),))
    open_page(page, serve(ModelEngines({"one": one, "two": two}), model="one,two", live_idle_s=3.0).url)
    page.until("document.getElementById('size').options.length > 1")
    assert page.run("[...document.getElementById('models').options].map(o => o.value)") == ["one", "two"]
    assert page.run("document.getElementById('models').value") == "one"
    assert made_by(page, "one", 256)
    choose(page, "#models", "two")
    page.until("document.getElementById('model').textContent.startsWith('two on')")
    settled(page)
    assert made_by(page, "two", 96)  # the size that it has
    assert page.run("[...document.getElementById('size').options].map(o => o.value)") == ["96 × 96"]
    newest = "document.querySelector('#recent img')?.src === document.getElementById('picture').src"
    page.until(newest)
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    page.until("window.copied")
    assert '"model":"two"' in page.run("window.copied")
    page.until("document.body.dataset.state === 'idle'")
    choose(page, "#models", "one")  # connects again, with the model that was chosen
    page.until("document.getElementById('size').options.length > 1")
    settled(page)
    assert made_by(page, "one", 256)
    page.until(newest)
    page.click("#recent button:nth-child(2)")
    settled(page)
    assert page.run("document.getElementById('models').value") == "two"
    assert made_by(page, "two", 96)
    assert page.console_errors == []


@needs_browser
def test_with_one_model_there_is_no_list(page: Page, plain: Running) -> None:
    open_page(page, plain.url)
    assert page.run("document.getElementById('models').offsetParent") is None
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    page.until("window.copied")
    assert '"model"' not in page.run("window.copied")


@needs_browser
def test_everything_works_from_the_keyboard(page: Page, plain: Running) -> None:
    open_page(page, plain.url)
    page.run("document.getElementById('sketch').focus()")
    page.press(" ")
    page.press("ArrowRight", times=12)
    page.press(" ")
    settled(page)
    assert strokes(shown_image(page)) > 0.001
    page.press("2")
    assert page.text("#steps [aria-checked=true]") == "2"
    seed = page.run("document.getElementById('seed').value")
    page.press("g")
    assert page.run("document.getElementById('seed').value") != seed
    page.press("e")
    assert page.run("document.getElementById('eraser').ariaChecked") == "true"
    page.press("Delete")
    settled(page)
    assert strokes(shown_image(page)) == 0
    page.press("z", control=True)
    settled(page)
    assert strokes(shown_image(page)) > 0.001
    assert page.console_errors == []


@needs_browser
def test_a_recent_image_comes_back_with_all_its_settings(page: Page, plain: Running) -> None:
    open_page(page, plain.url)
    page.stroke("#sketch", CIRCLE)
    settled(page)
    first, seed = shown_image(page), page.run("document.getElementById('seed').value")
    newest = "document.querySelector('#recent img')?.src === document.getElementById('picture').src"
    page.until(newest)
    page.click("#clear")
    page.click("#dice")
    settled(page)
    page.until(newest)
    page.click("#recent button:nth-child(2)")
    settled(page)
    assert page.run("document.getElementById('seed').value") == seed
    np.testing.assert_array_equal(shown_image(page), first)
    assert page.console_errors == []


@needs_browser
def test_the_curl_line_makes_the_image_that_is_shown(page: Page, plain: Running, tmp_path: Path) -> None:
    open_page(page, plain.url)
    page.stroke("#sketch", CIRCLE)
    settled(page)
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    page.until("window.copied")
    subprocess.run(["bash", "-c", page.run("window.copied")], cwd=tmp_path, check=True, timeout=PATIENCE_S)
    with Image.open(tmp_path / "picture.png") as image:
        downloaded = np.array(image.convert("RGB")).astype(int)
    assert np.abs(downloaded - shown_image(page)).mean() < 3  # the page shows a lossy webp
    assert page.run("document.getElementById('download').download").endswith(".webp")


@needs_browser
def test_an_error_is_shown_and_goes_away(page: Page, plain: Running) -> None:
    open_page(page, plain.url)
    page.run("document.getElementById('prompt').focus(), document.getElementById('prompt').select()")
    page.type("[[raise]]")
    page.until("!document.getElementById('problem').hidden")
    assert "the engine failed on this job" in page.text("#problem")
    page.run("document.getElementById('prompt').select()")
    page.type("a blue square")
    page.until("document.getElementById('problem').hidden")
    settled(page)
    assert page.console_errors == []


@needs_browser
def test_a_pause_ends_with_the_next_stroke(page: Page, serve: Serve) -> None:
    open_page(page, serve(live_idle_s=3.0).url)
    page.until("document.body.dataset.state === 'idle'")
    assert page.text("#status") == "Paused: draw or type to go on"
    page.stroke("#sketch", CIRCLE)
    settled(page)
    assert strokes(shown_image(page)) > 0.01
    assert page.console_errors == []


@needs_browser
def test_a_server_that_loads_its_model_says_so(page: Page, serve: Serve, gated: GatedEngine) -> None:
    running = serve(lambda: gated.gate.wait(PATIENCE_S) and gated, ready=False)
    page.go("about:blank")
    page.console_errors.clear()
    page.go(running.url + "/")
    page.until("document.body.dataset.state === 'loading'")
    assert page.text("#waiting") == page.text("#status") == "The model is loading"
    gated.gate.set()
    settled(page)
    assert page.console_errors == []


@needs_browser
def test_a_server_with_keys_asks_for_one(page: Page, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    running = serve(api_key_file=str(tmp_path / "keys"))
    page.go(running.url + "/")
    page.until("document.getElementById('key-dialog').open")
    page.type("right")
    page.click("#key-dialog button")
    settled(page)
    assert page.text("#model") == "fake on none, fake"
    page.run("sessionStorage.clear()")


@contextmanager
def process(port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "server", "--backend", "fake", "--log-level", "error", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPRINT_")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            assert found is not None
            wait_until(lambda: httpx.get(found[0] + "/health/ready").status_code == 200, "readiness")
            yield found[0]
        finally:
            server.terminate()
            assert server.wait(PATIENCE_S) == 0


@needs_browser
def test_a_lost_server_is_found_again(page: Page) -> None:
    with process(0) as url:
        open_page(page, url)
        page.stroke("#sketch", CIRCLE)
        settled(page)
        drawn = shown_image(page)
        assert page.console_errors == []
    page.until("document.body.dataset.state === 'lost'")
    assert page.text("#status") == "No connection, trying again"
    with process(int(url.rpartition(":")[2])):
        before = shown(page)
        page.until("document.body.dataset.state === 'live'")
        page.until(f"document.getElementById('picture').src !== {before!r}")
        settled(page)
        np.testing.assert_array_equal(shown_image(page), drawn)  # the drawing is complete
    assert [text for text in page.console_errors if "ERR_CONNECTION_REFUSED" not in text] == []


def test_the_page_asks_no_other_host() -> None:
    for path in STATIC.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}[^\s\"')]*", path.read_text()))
        assert addresses - {"http://www.w3.org/2000/svg"} == set(), path


def test_the_page_keeps_its_own_policy() -> None:
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style|javascript:", html) == []
