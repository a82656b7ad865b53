"""Settings: a flag and a variable per field; errors of unknown names and bad values say what is allowed."""

from dataclasses import fields
from typing import Any

import pytest

from engines.types import AdapterOption
from server.errors import SettingsError
from server.settings import Settings, flag_of, load_settings, parser, variable_of

GOOD: dict[str, tuple[str, Any]] = {
    "model": ("sprint-0.6b", "sprint-0.6b"),
    "engine": ("engines/x", "engines/x"),
    "engine_sizes": ("1024x1024, 512x768", ((1024, 1024), (512, 768))),
    "serve_while_building": ("yes", True),
    "backend": ("fake", "fake"),
    "cache": ("cache", "cache"),
    "precision": ("bf16", "bf16"),
    "device": ("cpu", "cpu"),
    "decoder": ("lite", "lite"),
    "fast_decoder": ("taesana", "taesana"),
    "variant": ("fp16", "fp16"),
    "controlnet": ("drawn", "drawn"),
    "lora": ("ring=a.safetensors, b=b:-0.5", (AdapterOption("ring", "a.safetensors"), AdapterOption("b", "b", -0.5))),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "workers": ("4", 4),
    "max_batch": ("16", 16),
    "max_queue": ("7", 7),
    "timeout_ms": ("250", 250),
    "api_key_file": ("keys", "keys"),
    "body_limit_mib": ("0.5", 0.5),
    "body_timeout_s": ("3", 3.0),
    "codec_threads": ("4", 4),
    "batch_timeout_s": ("9.5", 9.5),
    "drain_delay_s": ("1", 1.0),
    "shutdown_timeout_s": ("0", 0.0),
    "live_sessions": ("5", 5),
    "live_idle_s": ("7.5", 7.5),
    "cors_origins": ("https://a.example, http://b.example:81", ("https://a.example", "http://b.example:81")),
    "compat": ("sdapi", ("sdapi",)),
    "safety": ("prompt=a,b/words,image=opennsfw:0.8", (("prompt", "a,b/words"), ("image", "opennsfw:0.8"))),
    "otlp_endpoint": ("http://collector:4318", "http://collector:4318"),
    "log_format": ("json", "json"),
    "log_level": ("warning", "warning"),
    "request_buckets": (".1 .2,5", (0.1, 0.2, 5.0)),
    "stage_buckets": ("1", (1.0,)),
    "fake_delay_ms": ("12.5", 12.5),
}


def test_the_table_of_this_test_is_complete() -> None:
    assert list(GOOD) == [field.name for field in fields(Settings)]


@pytest.mark.parametrize("name", GOOD)
def test_flag_and_variable_mean_the_same_and_the_flag_wins(name: str) -> None:
    text, value = GOOD[name]
    by_flag = load_settings([flag_of(name), text], {})
    assert getattr(by_flag, name) == value
    assert load_settings([], {variable_of(name): text}) == by_flag
    assert load_settings([flag_of(name), text], {variable_of(name): str(getattr(Settings(), name))}) == by_flag


def test_adapters_are_given_one_by_one_too() -> None:
    settings = load_settings(["--lora", "a=x", "--lora", "b=y:2"], {"SPRINT_LORA": "c=z"})
    assert settings.lora == (AdapterOption("a", "x"), AdapterOption("b", "y", 2.0))


def test_defaults_are_the_dataclass() -> None:
    assert load_settings([], {"PATH": "/bin", "OTHER_SPRINT_PORT": "x"}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("port", "65536", "0 to 65535"),
        ("port", "http", "0 to 65535"),
        ("max_batch", "0", "1 to 64"),
        ("backend", "cuda", "eager, compiled"),
        ("body_limit_mib", "nan", "0.001 to 1024"),
        ("log_level", "INFO", "debug, info"),
        ("model", " ", "a folder, a hub id"),
        ("cors_origins", "example.org", "origins such as"),
        ("compat", "comfy", "of sdapi"),
        ("safety", "words.txt", "prompt=... and image=..."),
        ("safety", "video=x", "prompt=... and image=..."),
        ("safety", "prompt=", "prompt=... and image=..."),
        ("safety", "prompt=a,prompt=b", "prompt=... and image=..."),
        ("request_buckets", ".2 .1", "rising"),
        ("stage_buckets", "1 inf", "rising"),
    ],
)
def test_a_bad_value_is_told_with_its_name_and_what_is_allowed(name: str, text: str, allowed: str) -> None:
    for arguments, environment, source in (
        ([flag_of(name), text], {}, flag_of(name)),
        ([], {variable_of(name): text}, variable_of(name)),
    ):
        with pytest.raises(SettingsError) as caught:
            load_settings(arguments, environment)
        assert str(caught.value).startswith(f"{source}: got {text!r}, allowed: ")
        assert allowed in str(caught.value)


def test_an_unknown_variable_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"SPRINT_MAX_BACH='8': unknown setting; did you mean SPRINT_MAX_BATCH\?"):
        load_settings([], {"SPRINT_MAX_BACH": "8"})


@pytest.mark.parametrize("arguments", [["--prot", "1"], ["--por", "1"], ["stray"]])
def test_an_unknown_flag_stops_the_start(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(arguments, {})
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_help_names_every_flag_its_default_and_what_is_allowed() -> None:
    text = " ".join(parser().format_help().split())
    for field in fields(Settings):
        assert flag_of(field.name) in text
    assert "(default 8000)" in text
    assert "a whole number from 1 to 64" in text


def test_a_switch_needs_no_value() -> None:
    assert load_settings(["--serve-while-building", "--engine", "auto"], {}).serve_while_building
    assert not load_settings(["--serve-while-building", "no"], {}).serve_while_building


def test_engines_are_not_built_for_a_backend_that_runs_none() -> None:
    with pytest.raises(SettingsError, match="--engine: got 'auto' with --backend eager"):
        load_settings(["--engine", "auto", "--backend", "eager"], {})
