"""A real browser, driven over the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from running_server import PATIENCE_S, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"),
)

COUNTED = "{ let last = 0; crypto.getRandomValues = (array) => array.fill(++last); }"


def executable() -> str | None:
    """The Chromium of this machine; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page. `complaints` are what it wrote to its console as errors, and exceptions nobody caught.

    Its random numbers are the same in each run: 1, 2, 3 and so on after each load.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self.console_errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=COUNTED)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.console_errors.append(json.dumps(given["exceptionDetails"])[:500])
        elif event["method"] == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.console_errors.append(json.dumps(given["args"])[:500])
        elif event["method"] == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.console_errors.append(given["entry"]["text"] + " " + given["entry"].get("url", ""))

    def view(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.run("document.readyState") == "complete", "the page")

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        wait_until(lambda: self.run(script), script)

    def text(self, css: str) -> str:
        found: str = self.run(f"document.querySelector({css!r}).textContent.trim()")
        return found

    def click(self, css: str) -> None:
        x, y = self.middle(css)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, css: str) -> tuple[float, float]:
        left, top, width, height = self.box(css)
        return left + width / 2, top + height / 2

    def box(self, css: str) -> list[float]:
        script = f"document.querySelector({css!r}).getBoundingClientRect()"
        found: list[float] = self.run(f"(({{x, y, width, height}}) => [x, y, width, height])({script})")
        return found

    def stroke(self, css: str, points: list[tuple[float, float]], *, touch: bool = False) -> None:
        """Draws over an element; points are shares of its sides."""
        left, top, width, height = self.box(css)
        places = [{"x": left + x * width, "y": top + y * height} for x, y in points]
        if touch:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=places[:1])
            for place in places[1:]:
                self.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[place])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        self.call("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **places[0])
        for place in places[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", **place)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **places[-1])

    def press(self, key: str, *, control: bool = False, times: int = 1) -> None:
        for _ in range(times):
            named = {"key": key, "code": "Space" if key == " " else key, "modifiers": 2 if control else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a fresh Chromium, whose profile is the folder `profile`."""
    program = executable()
    assert program is not None
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            noted = profile / "DevToolsActivePort"
            wait_until(lambda: noted.exists() and noted.read_text().count("\n"), "the browser")
            port = int(noted.read_text().splitlines()[0])
            targets = httpx.get(f"http://127.0.0.1:{port}/json").json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            with connect(address, max_size=None, proxy=None, open_timeout=PATIENCE_S) as socket:
                page = Page(socket)
                yield page
                with contextlib.suppress(ConnectionClosed):  # it answers, or is gone already
                    page.call("Browser.close")
        finally:
            if process.poll() is None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
