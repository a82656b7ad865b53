"""An installation by pip: one version everywhere, console scripts that start, hooks and templates that hold."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import venv
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import build_engine
from server import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {"sana-sprint-server": "python -m server", "sana-sprint-build": "build_engine.py"}
BODY = {"prompt": "a red circle on a white background", "seed": 7}


def test_the_version_is_one_everywhere() -> None:
    chart = yaml.safe_load((ROOT / "deploy/kubernetes/sana-sprint-server/Chart.yaml").read_text())
    client = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())["project"]
    versions = {PROJECT["version"], __version__, chart["version"], chart["appVersion"], client["version"]}
    assert versions == {__version__}
    assert str(Version(__version__)) == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {__version__}" in changelog or f"\n## [{__version__}]" in changelog


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_console_script_resolves(name: str) -> None:
    assert set(PROJECT["scripts"]) == set(SCRIPTS)
    assert callable(EntryPoint(name, PROJECT["scripts"][name], "console_scripts").load())


def test_the_builder_reads_the_command_line_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sana-sprint-build", "--list", str(tmp_path)])
    assert build_engine.main() == 0
    assert capsys.readouterr().out == ""


def test_hooks_run_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    programs = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks}
    assert programs == {"ruff format", "ruff check", "mypy"}
    assert all(f"$(BIN)/{program}" in makefile for program in programs)


def test_templates_are_forms_that_ask_for_something() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form), path
        assert any(item.get("validations", {}).get("required") for item in form["body"]), path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has this project from a wheel, and its dependencies from here."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed; it tells which files a clone has")
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "clone"
    clone.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone of git; it tells which files belong to the project")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Behind the environment's own packages, so that nothing of ours comes from the working tree.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    _run(*pip, "install", "--no-deps", "--no-build-isolation", "--no-index", str(clone))
    shutil.rmtree(clone)
    return folder / "venv" / "bin"


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_installed_script_shows_its_flags(scripts: Path, tmp_path: Path, name: str) -> None:
    shown = _run(scripts / name, "--help", cwd=tmp_path)
    assert "--model" in shown
    assert "--precision" in shown


def test_an_installed_server_draws_with_the_shipped_checkpoint(scripts: Path, tmp_path: Path) -> None:
    command = [scripts / "sana-sprint-server", "--port", "0", "--log-level", "error"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPRINT_"))}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith("curl "))
            address = line.split()[2]
            request = urllib.request.Request(address, json.dumps(BODY).encode(), {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.headers["content-type"] == "image/png"
                assert answer.headers["x-seed"] == "7"
            info = address.rpartition("/")[0] + "/v1/info"
            with urllib.request.urlopen(info, timeout=60) as answer:
                assert json.load(answer)["checkpoint"] == "tiny"
        finally:
            process.terminate()
    assert process.returncode == 0
