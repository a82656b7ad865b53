"""All settings in one frozen dataclass; each field is a flag and a SPRINT_<FLAG> environment variable.

Flags override the environment, the environment overrides defaults; an empty variable counts as unset. A bad value, an
unknown flag and an unknown SPRINT_ name stop the start, with the name, the value and what is allowed.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from engines.types import AdapterOption
from server.errors import SettingsError
from server.origins import parse_origin

T = TypeVar("T")
N = TypeVar("N", int, float)

PREFIX = "SPRINT_"

BACKENDS = ("auto", "eager", "compiled", "cuda-graph", "openvino", "tensorrt", "torch-tensorrt", "fake")
BUILT_BACKENDS = ("auto", "openvino", "tensorrt")  # backends that --engine auto finds or builds
# Seconds; most buckets lie between 20 and 400 ms.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0),
)
STAGE_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512),
    *(1.0, 2.0, 5.0, 10.0),
)


MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of NAME=SOURCE

# Variables that Kubernetes sets for a Service named sprint*: name, suffix, value. SPRINT_PORT is a setting as well, so
# the value decides.
SERVICE_LINK = re.compile(
    r"(SPRINT(?:_[A-Z0-9_]+?)?)_(?:SERVICE_HOST=.*|SERVICE_PORT(?:_[A-Z0-9_]+)?=.*|PORT=(?:tcp|udp|sctp)://.*"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?=.*)"
)


class ModelOption(NamedTuple):
    """A checkpoint of --model: the name in requests, and a folder, hub id or short name."""

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> "ModelOption":
        """Parses NAME=SOURCE, or SOURCE, which then is the name too."""
        name, equals, source = text.partition("=")
        return cls(name, source) if equals and MODEL_NAME.fullmatch(name) else cls(text, text)


@dataclass(frozen=True, slots=True)
class ValueType(Generic[T]):
    """Parses the text of a setting (ValueError for a bad one); `allowed` describes the allowed values."""

    parse: Callable[[str], T]
    allowed: str


def _ranged(number: Callable[[str], N], low: float, high: float, allowed: str) -> ValueType[N]:
    def parse(text: str) -> N:
        value = number(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return ValueType(parse, allowed)


def integer(low: int, high: int) -> ValueType[int]:
    return _ranged(int, low, high, f"a whole number from {low} to {high}")


def real(low: float, high: float) -> ValueType[float]:
    return _ranged(float, low, high, f"a number from {low:g} to {high:g}")


def choice(*names: str) -> ValueType[str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return ValueType(parse, ", ".join(names))


def text(allowed: str) -> ValueType[str]:
    def parse(value: str) -> str:
        if not value.strip():
            raise ValueError(value)
        return value

    return ValueType(parse, allowed)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(parse_origin(name.strip()) for name in text.split(",") if name.strip())


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for size in text.split(","):
        width, height = (int(side) for side in size.strip().split("x"))
        if min(width, height) <= 0:
            raise ValueError(text)
        sizes.append((width, height))
    return tuple(sizes)


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "true", "1", "no", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("yes", "true", "1")


def _adapters(text: str) -> tuple[AdapterOption, ...]:
    return tuple(AdapterOption.parse(part) for part in text.split(",") if part.strip())


def _models(text: str) -> str:
    models = [ModelOption.parse(part.strip()) for part in text.split(",")]
    if not all(model.source for model in models) or len({model.name for model in models}) < len(models):
        raise ValueError(text)
    return text


def _buckets(text: str) -> tuple[float, ...]:
    bounds = tuple(float(part) for part in text.replace(",", " ").split())
    rising = all(low < high for low, high in pairwise(bounds))
    if not bounds or not rising or bounds[0] <= 0 or not math.isfinite(bounds[-1]):
        raise ValueError(text)
    return bounds


ORIGINS = ValueType(
    _origins, "origins such as https://example.org or tauri://localhost (no path) separated by commas, or *"
)
SIZES = ValueType(_sizes, "sizes such as 1024x1024,512x512 in pixels, width x height")
BOOLEAN = ValueType(_boolean, "yes or no")
ADAPTERS = ValueType(
    _adapters, "NAME=PATH or NAME=PATH:SCALE, MODEL: before it with several models; separated by commas"
)
MODELS = ValueType(
    _models,
    "a folder, a hub id or a short name, each with NAME= before it if wanted; several, each name once, by commas",
)
BUCKETS = ValueType(_buckets, "rising positive seconds separated by commas or spaces")


def choices(*names: str) -> ValueType[tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in value.split(",") if name.strip())
        if not chosen or set(chosen) - set(names):
            raise ValueError(value)
        return chosen

    return ValueType(parse, "separated by commas, of " + ", ".join(names))


def assignments(*names: str) -> ValueType[tuple[tuple[str, str], ...]]:
    """NAME=VALUE pairs, each name at most once; a comma that no name follows belongs to the value."""

    def parse(text: str) -> tuple[tuple[str, str], ...]:
        before, *parts = re.split(rf"(?:^|,)({'|'.join(names)})=", text)
        pairs = tuple(zip(parts[::2], parts[1::2], strict=True))
        if before or not pairs or len(dict(pairs)) < len(pairs) or not all(value for _, value in pairs):
            raise ValueError(text)
        return pairs

    return ValueType(parse, " and ".join(f"{name}=..." for name in names) + " separated by commas")


def option(default: T, value_type: ValueType[Any], explanation: str) -> T:
    """Declares a field of Settings. Returns the type of the default, as dataclasses.field does."""
    declared: T = field(default=default, metadata={"type": value_type, "help": explanation})
    return declared


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of `python -m server`."""

    model: str = option(
        "tiny", MODELS, "checkpoint in the diffusers layout, repeats; requests choose, the first is the default"
    )
    engine: str | None = option(
        None,
        text("auto, none, or a folder that build_engine.py wrote; MODEL=VALUE for one of several models"),
        "built engines; auto finds or builds what fits, none runs PyTorch; default: auto on a GPU, none without",
    )
    engine_sizes: tuple[tuple[int, int], ...] = option(
        (), SIZES, "sizes that --engine auto builds; default: the checkpoint's sizes"
    )
    serve_while_building: bool = option(False, BOOLEAN, "make images by PyTorch until --engine auto has built")
    backend: str = option("auto", choice(*BACKENDS), "how the modules are executed; auto decides and logs the reason")
    cache: str | None = option(
        None, text("a folder"), "cache of built and compiled engines; default: sana-sprint in the user's cache"
    )
    precision: str = option(
        "auto", choice("auto", "fp32", "bf16", "int8", "fp8"), "of the arithmetic; auto decides and says why"
    )
    device: str = option("auto", choice("auto", "cpu", "cuda"), "where the modules run; auto decides and says why")
    decoder: str | None = option(
        None, text("full, lite, taesana, a folder, a hub id or a .pth file"), "another decoder of the same latents"
    )
    fast_decoder: str | None = option(
        None, text("lite, taesana, a folder, a hub id or a .pth file"), "a second decoder, which requests may choose"
    )
    variant: str | None = option(
        None, text("a name such as fp16"), "weights to take where the checkpoint has several; default: the plain ones"
    )
    controlnet: str | None = option(
        None, text("a folder or a hub id"), "ControlNet for sketches; default: controlnet/ in the checkpoint"
    )
    lora: tuple[AdapterOption, ...] = option(
        (), ADAPTERS, "adapters, repeats; with a scale fused at start, without one for requests to choose"
    )
    host: str = option("127.0.0.1", text("a name or an address"), "address to listen on")
    port: int = option(8000, integer(0, 65535), "port to listen on; 0 takes a free port")
    workers: int = option(
        1, integer(1, 64), "processes behind the port, one for each GPU; limits such as max-queue are each one's own"
    )
    max_batch: int = option(8, integer(1, 64), "maximum number of jobs in a batch")
    max_queue: int = option(128, integer(1, 100_000), "maximum number of waiting jobs; further ones get 429 at once")
    timeout_ms: int = option(
        30_000,
        integer(1, 3_600_000),
        "a job that has not started within this time gets 504; requests may set another time",
    )
    api_key_file: str | None = option(
        None, text("a file"), "one key per line, plain or sha256:<hex>; reloaded when it changes"
    )
    body_limit_mib: float = option(24.0, real(0.001, 1024), "largest request body")
    body_timeout_s: float = option(30.0, real(0.01, 3600), "a body that has not arrived within this time gets 408")
    codec_threads: int = option(2, integer(1, 64), "threads that decode and encode images")
    batch_timeout_s: float = option(
        300.0, real(0.05, 86_400), "a batch that runs longer means a hung engine: not ready, then exit 70"
    )
    drain_delay_s: float = option(
        0.0, real(0, 3600), "after SIGTERM, keep listening at least this long, so that a load balancer sees 503"
    )
    shutdown_timeout_s: float = option(30.0, real(0, 3600), "after SIGTERM, limit for answering accepted requests")
    live_sessions: int = option(64, integer(1, 100_000), "maximum number of live sessions on /v1/live")
    live_idle_s: float = option(120.0, real(0.05, 86_400), "a live session ends after this time without a message")
    cors_origins: tuple[str, ...] = option((), ORIGINS, "origins whose pages may call this server; none by default")
    compat: tuple[str, ...] = option((), choices("sdapi"), "APIs of other servers to answer to; none by default")
    safety: tuple[tuple[str, str], ...] = option(
        (),
        assignments("prompt", "image"),
        "checkers of prompts (a file of words) and images (opennsfw); off by default",
    )
    otlp_endpoint: str | None = option(
        None,
        text("an address such as http://collector:4318"),
        "collector of traces, by OTLP over HTTP; none by default",
    )
    log_format: str = option("text", choice("text", "json"), "format of log lines")
    log_level: str = option("info", choice("debug", "info", "warning", "error"), "least severe line that is logged")
    request_buckets: tuple[float, ...] = option(REQUEST_BUCKETS, BUCKETS, "histogram of request durations, seconds")
    stage_buckets: tuple[float, ...] = option(STAGE_BUCKETS, BUCKETS, "histogram of stage durations, seconds")
    fake_delay_ms: float = option(0.0, real(0, 600_000), "duration of a batch with --backend fake")

    @property
    def models(self) -> tuple[ModelOption, ...]:
        """The checkpoints of --model, the default first."""
        return tuple(ModelOption.parse(part.strip()) for part in self.model.split(","))

    @property
    def body_limit(self) -> int:
        """The largest request body in bytes."""
        return int(self.body_limit_mib * 2**20)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def parser() -> argparse.ArgumentParser:
    """Returns the command line, one flag per field of Settings. `load_settings` parses the values."""
    command = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves a SANA-Sprint checkpoint over HTTP. Every flag is also SPRINT_<FLAG> in the environment.",
        allow_abbrev=False,
    )
    for item in fields(Settings):
        value_type: ValueType[Any] = item.metadata["type"]
        shown = item.default if not isinstance(item.default, tuple) else ",".join(map(str, item.default))
        suffix = "" if shown in (None, "", False) else f" (default {shown})"
        explanation = f"{item.metadata['help']}: {value_type.allowed}{suffix}".replace("%", "%%")
        bare: dict[str, Any] = {"nargs": "?", "const": "yes"} if isinstance(item.default, bool) else {}
        repeats = "append" if item.name in ("model", "engine", "lora") else "store"
        command.add_argument(flag_of(item.name), metavar="VALUE", action=repeats, help=explanation, **bare)
    return command


def load_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Returns the settings of a command line and an environment.

    Raises SettingsError; argparse exits with code 2 for an unknown flag.
    """
    flags = vars(parser().parse_args(arguments))
    known = {variable_of(item.name): item.name for item in fields(Settings)}
    for variable, value in environment.items():
        link = SERVICE_LINK.fullmatch(f"{variable}={value}")
        if link is not None:
            name = link[1].lower().replace("_", "-")
            raise SettingsError(
                f"{variable}={value!r}: no setting, but a link to the Service {name!r}, which Kubernetes sets in every "
                "pod beside it; turn links off (enableServiceLinks: false in the pod's spec) or rename the Service"
            )
        if variable.startswith(PREFIX) and value and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise SettingsError(f"{variable}={value!r}: unknown setting; {hint}allowed: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for item in fields(Settings):
        source, raw = flag_of(item.name), flags[item.name]
        if raw is None:
            source, raw = variable_of(item.name), environment.get(variable_of(item.name)) or None
        if raw is None:
            continue
        if isinstance(raw, list):
            raw = ",".join(raw)
        value_type: ValueType[Any] = item.metadata["type"]
        try:
            values[item.name] = value_type.parse(raw)
        except ValueError as error:
            raise SettingsError(f"{source}: got {raw!r}, allowed: {value_type.allowed}") from error
    settings = Settings(**values)
    if settings.engine == "auto" and settings.backend not in BUILT_BACKENDS:
        raise SettingsError(
            f"--engine: got 'auto' with --backend {settings.backend}, which runs no built engine; allowed with it: "
            f"{', '.join(BUILT_BACKENDS)}"
        )
    return settings
