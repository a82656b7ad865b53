"""Several --model: settings of each, replacement of one engine, and refusals before anything is loaded."""

from pathlib import Path

import pytest
import torch

from engines.artifacts import memory
from engines.device.memory import available_bytes
from engines.fake import FakeEngine
from engines.types import AdapterOption, Engine
from server.__main__ import main
from server.errors import EXIT_SETTINGS, SettingsError
from server.generation.engine_source import Building, FixedEngineSource
from server.generation.model_engines import ModelEngines, engines_by_name
from server.loading import engine_loader
from server.loading.engine_loader import engine_source
from server.loading.model_sources import ModelSources, settings_by_model
from server.settings import ModelOption, Settings, load_settings
from server.telemetry import logs

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[3] / "models/tiny"


def nothing() -> None:
    """No wake-up is needed, or no check."""


def test_models_are_given_one_by_one_or_by_commas() -> None:
    settings = load_settings(["--model", "tiny", "--model", "b=org/b@v2"], {"SPRINT_MODEL": "c"})
    assert settings.models == (ModelOption("tiny", "tiny"), ModelOption("b", "org/b@v2"))
    assert load_settings([], {"SPRINT_MODEL": "tiny, b=org/b@v2"}).models == settings.models
    assert Settings().models == (ModelOption("tiny", "tiny"),)
    assert Settings(model="./a=b").models == (ModelOption("./a=b", "./a=b"),)


@pytest.mark.parametrize("text", ["tiny,tiny", "a=x,a=y", "tiny,,b", "a=,b"])
def test_names_that_cannot_be_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--model: got .*several, each name once"):
        load_settings(["--model", text], {})


def test_each_model_has_its_engine_and_its_adapters() -> None:
    each = settings_by_model(
        Settings(
            model="a,b=folder",
            engine="b=engines/b,a=none",
            lora=(AdapterOption.parse("a:ring=x"), AdapterOption.parse("b:ring=y:2")),
            precision="bf16",
        )
    )
    assert [(one.model, one.engine, one.precision) for one in each.values()] == [
        ("a", "none", "bf16"),
        ("b=folder", "engines/b", "bf16"),
    ]
    assert each["a"].lora == (AdapterOption("ring", "x"),)
    assert each["b"].lora == (AdapterOption("ring", "y", 2.0),)


@pytest.mark.parametrize(("engine", "expected"), [(None, None), ("auto", "auto"), ("none", "none")])
def test_some_engines_are_for_all(engine: str | None, expected: str | None) -> None:
    each = settings_by_model(Settings(model="a,b", engine=engine))
    assert [one.engine for one in each.values()] == [expected] * 2


def test_one_model_keeps_its_options() -> None:
    settings = Settings(engine="engines/a,b=c", lora=(AdapterOption("ring", "x"),))
    assert settings_by_model(settings) == {"tiny": settings}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "engines/a"], "--engine: got 'engines/a' for no model; give MODEL=engines/a, where MODEL is one"),
        (
            ["--engine", "c=engines/c"],
            "--engine: got 'c=engines/c' for 'c', which no --model gives; MODEL is one of a, b",
        ),
        (["--engine", "a=x", "--engine", "a=y"], "--engine: got 'x' and 'y' for a, allowed: one"),
        (["--engine", "a=auto", "--backend", "eager"], "which runs no built engine"),
        (["--lora", "ring=x"], "--lora: got 'ring=x' for no model; give MODEL:ring=x, where MODEL is one of a, b"),
        (["--lora", "c:ring=x"], "--lora: got 'c:ring=x' for 'c', which no --model gives"),
    ],
)
def test_an_option_of_no_model_stops_the_start(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # main would send the logs of all later tests to its stderr
    for more in ([], ["--workers", "2"]):
        monkeypatch.setattr("sys.argv", ["server", "--model", "a", "--model", "b", *flags, *more])
        assert main() == EXIT_SETTINGS
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


class Source(FixedEngineSource):
    """Has one engine to load, and others that come later."""

    def __init__(self, name: str, building: Building | None = None) -> None:
        super().__init__(lambda: FakeEngine(checkpoint=name))
        self.better: Engine | None = None
        self.closed = False
        self._building = building

    def replacement(self) -> Engine | None:
        better, self.better = self.better, None
        return better

    def building(self) -> Building | None:
        return self._building

    def close(self) -> None:
        self.closed = True


def test_replacements_of_one_model_keep_the_others() -> None:
    one, two = Source("one"), Source("two", Building("decoder", 10, None))
    both = ModelSources({"one": one, "two": two}, nothing)
    first = both.load(nothing)
    assert both.replacement() is None
    assert both.building() == Building("decoder", 10, None)
    two.better = better = FakeEngine(checkpoint="two")
    second = both.replacement()
    assert isinstance(second, ModelEngines)
    assert second.engines == {**engines_by_name(first), "two": better}
    one.better = FakeEngine(checkpoint="one")
    two.better = FakeEngine(checkpoint="two")
    assert both.replacement() is not None
    assert both.replacement() is None
    both.close()
    assert (one.closed, two.closed) == (True, True)


def test_the_fake_backend_serves_several_names() -> None:
    engine = engine_source(Settings(model="a,b", backend="fake", lora=(AdapterOption.parse("b:ring=x"),))).load(nothing)
    adapters = {name: one.limits.adapters for name, one in engines_by_name(engine).items()}
    assert adapters == {"a": (), "b": ("ring",)}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_what_host_and_container_leave(tmp_path: Path, version: int) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_bytes(CPU, tmp_path) is None
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:      64 kB\n")
    assert available_bytes(CPU, tmp_path) == 64 * 1024
    folder, limit, used = {
        1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("sys/fs/cgroup", "memory.max", "memory.current"),
    }[version]
    write(f"{folder}/{limit}", "max\n")
    write(f"{folder}/{used}", "30000\n")
    assert available_bytes(CPU, tmp_path) == 64 * 1024
    write(f"{folder}/{limit}", "40000\n")
    assert available_bytes(CPU, tmp_path) == 10_000
    write(f"{folder}/memory.stat", "anon 5\ninactive_file 7000\n")
    assert available_bytes(CPU, tmp_path) == 17_000


def test_models_that_cannot_fit_are_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1_000_000)
    monkeypatch.setattr(engine_loader, "load", pytest.fail)
    source = engine_source(Settings(model="tiny,other=tiny", device="cpu", backend="eager"))
    with pytest.raises(SettingsError, match=r"--model: tiny, other need about .* MB, cpu has 1.0 MB left; give fewer"):
        source.load(nothing)
