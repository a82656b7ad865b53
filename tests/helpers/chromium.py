"""Drives a real browser over the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

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

COUNTING_RANDOM_VALUES = "{ let last = 0; crypto.getRandomValues = (array) => array.fill(++last); }"


def executable() -> str | None:
    """Returns the path of this machine's Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page. `console_errors` lists errors and warnings on its console, and uncaught exceptions.

    Its random numbers are 1, 2, 3 and so on after each load, so that every run is the same.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self.console_errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=COUNTING_RANDOM_VALUES)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._record(message)

    def _record(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.console_errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.console_errors.append(json.dumps(parameters["args"])[:500])
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.console_errors.append(parameters["entry"]["text"] + " " + parameters["entry"].get("url", ""))

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
        """Returns the value of an expression, or of its promise."""
        evaluation = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in evaluation, evaluation
        return evaluation["result"].get("value")

    def until(self, script: str) -> None:
        wait_until(lambda: self.run(script), script)

    def text(self, css: str) -> str:
        content: str = self.run(f"document.querySelector({css!r}).textContent.trim()")
        return content

    def click(self, css: str) -> None:
        x, y = self.middle(css)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, css: str) -> tuple[float, float]:
        left, top, width, height = self.box(css)
        return left + width / 2, top + height / 2

    def box(self, css: str) -> list[float]:
        script = f"document.querySelector({css!r}).getBoundingClientRect()"
        sides: list[float] = self.run(f"(({{x, y, width, height}}) => [x, y, width, height])({script})")
        return sides

    def stroke(self, css: str, points: list[tuple[float, float]], *, touch: bool = False) -> None:
        """Draws a stroke on an element; points are shares of its sides."""
        left, top, width, height = self.box(css)
        positions = [{"x": left + x * width, "y": top + y * height} for x, y in points]
        if touch:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=positions[:1])
            for position in positions[1:]:
                self.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[position])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        self.call("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **positions[0])
        for position in positions[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", **position)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **positions[-1])

    def press(self, key: str, *, control: bool = False, times: int = 1) -> None:
        for _ in range(times):
            event = {"key": key, "code": "Space" if key == " " else key, "modifiers": 2 if control else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts a Chromium with the folder `profile`, and yields its page."""
    program = executable()
    assert program is not None
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file = profile / "DevToolsActivePort"
            wait_until(lambda: port_file.exists() and port_file.read_text().count("\n"), "the browser")
            port = int(port_file.read_text().splitlines()[0])
            targets = httpx.get(f"http://127.0.0.1:{port}/json").json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            with connect(address, max_size=None, proxy=None, open_timeout=PATIENCE_S) as socket:
                page = Page(socket)
                yield page
                with contextlib.suppress(ConnectionClosed):  # it closes before or after its answer
                    page.call("Browser.close")
        finally:
            if process.poll() is None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
