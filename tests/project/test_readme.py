"""Every command of the README is executed here or by CI, or, where it needs a GPU or a container, its flags are parsed.

CI runs `make test`, and `make run`'s server as tests/test_tiny.py starts it. `make image-check` runs the docker lines.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from running_server import Running, read_image, start

import build_engine
from engines.fake import FakeEngine
from server.settings import Settings, flag_of, load_settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SETTINGS_PAGE = (ROOT / "docs/operate/settings.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
OUTSIDE_PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
COMMANDS = [line.strip() for line in OUTSIDE_PROSE.splitlines() if line.startswith("    ")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BUILT = "artifacts/tiny"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with ExitStack() as stack:
        yield start(stack, FakeEngine())


def make(words: list[str]) -> None:
    assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def server(words: list[str]) -> None:
    load_settings(words[3:], {})


def builder(words: list[str]) -> None:
    if words[2] == "--list":
        assert build_engine.main([*words[2:3], str(ROOT / "no such folder")]) == 0
    else:
        build_engine.parse(words[2:])


def compose(words: list[str]) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    if "--profile" in words:
        assert words[words.index("--profile") + 1] in profiles
    assert set(words[words.index("up") + 1 :]) <= {"--build", "--detach"}


def container(words: list[str]) -> None:
    """`make image-check` runs both lines; tests/deploy/test_image.py holds the flags of `run`."""
    assert words[1] in ("build", "run")
    assert "sana-sprint-server:cpu" in words


def curl(words: list[str]) -> None:
    """test_the_curl_lines_are_answered sends it."""
    assert any(word.startswith(ADDRESS) for word in words)


HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "make": make,
    "python -m server": server,
    "python build_engine.py": builder,
    "docker compose": compose,
    "docker": container,
    "curl": curl,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_known_and_its_flags_are_accepted(command: str) -> None:
    handler = next((known for start, known in HANDLERS.items() if command.startswith(start + " ")), None)
    assert handler, f"no test covers this command of the README: {command}"
    handler(shlex.split(command))


def test_three_readers_find_a_command_on_their_first_screen() -> None:
    for heading, command in (
        ("You have a GPU host", "docker compose --profile gpu up"),
        ("You have a laptop", "make run"),
        ("You want to change the code", "make test"),
    ):
        section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
        assert f"    {command}" in "\n".join(section.splitlines()[:8]), heading


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("curl ")])
def test_the_curl_lines_are_answered(command: str, running: Running) -> None:
    words = shlex.split(command)
    (path,) = [word.removeprefix(ADDRESS) for word in words if word.startswith(ADDRESS)]
    headers = dict(word.split(": ") for word in words if word.startswith("content-type: "))
    body = words[words.index("-d") + 1]
    answer = running.client.post(path, content=body, headers=headers)
    assert answer.status_code == 200
    if "-o" in words:
        assert answer.headers["content-type"] == "image/png"
    else:
        count, seed = (json.loads(body)[name] for name in ("num_images", "seed"))
        assert [image["seed"] for image in answer.json()["images"]] == [seed + i for i in range(count)]


def stand_in() -> ModuleType:
    """Returns a module `openai` whose client posts what it is given; `make clients` runs the real client."""

    class Images:
        def __init__(self, base_url: str) -> None:
            self._url = base_url

        def generate(self, **body: Any) -> SimpleNamespace:
            answer = httpx.post(f"{self._url}/images/generations", json=body, trust_env=False).raise_for_status().json()
            return SimpleNamespace(data=[SimpleNamespace(**image) for image in answer["data"]])

    module = ModuleType("openai")
    module.OpenAI = lambda base_url, api_key: SimpleNamespace(images=Images(base_url))  # type: ignore[attr-defined] # noqa: ARG005
    return module


def test_the_openai_example_runs(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [example for example in PYTHON if "from openai" in example]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", stand_in())
    # The fake engine serves under its own name.
    adapted = example.replace(ADDRESS, running.url).replace('model="tiny"', 'model="fake"')
    exec(compile(adapted, "README.md", "exec"), {})
    assert read_image((tmp_path / "square.png").read_bytes()).shape == (256, 256, 3)


def shown(value: object) -> str:
    """Returns a default as the settings page writes it."""
    if value in (None, (), ""):
        return ""
    if isinstance(value, bool):
        return "`yes`" if value else "`no`"
    if isinstance(value, tuple):
        return f"`{', '.join(f'{item:g}' for item in value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def rows(page: str) -> dict[str, str]:
    """Flag -> default of each table row that begins with a flag; a row may name several."""
    found = {}
    for line in page.splitlines():
        if line.startswith("| `--"):
            flags, defaults = line.split("|")[1:3]
            names = re.findall(r"`(--[\w-]+)`", flags)
            values = defaults.strip().split(", ") if len(names) > 1 else [defaults.strip()]
            found |= dict(zip(names, values, strict=True))
    return found


def defaults() -> dict[str, str]:
    return {flag_of(item.name): shown(item.default) for item in fields(Settings)}


def test_the_configuration_table_holds_the_defaults() -> None:
    table = rows(README)
    assert len(table) >= 12
    assert {flag: defaults().get(flag) for flag in table} == table


def test_the_settings_page_lists_every_flag_with_its_default() -> None:
    assert rows(SETTINGS_PAGE) == defaults()


def steps(text: str) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] .+$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_build_prints_what_the_readme_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    (command,) = [line for line in COMMANDS if line.startswith("python build_engine.py --model tiny")]
    out = tmp_path / "tiny"
    assert build_engine.main([str(out) if word == BUILT else word for word in shlex.split(command)[2:]]) == 0
    assert steps(capsys.readouterr().err) == steps(README)
    assert build_engine.main(["--list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert re.fullmatch(r"\S+/tiny: tiny openvino fp32 256x256 on .+, \d+ MB\n", listed)
