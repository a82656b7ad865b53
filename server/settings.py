"""All settings in one frozen object; a flag and a SPRINT_<FLAG> environment variable for each field.

A flag wins over the environment, the environment over the default; an empty variable is one that is not set. A bad
value, an unknown flag or an unknown SPRINT_ name stops the start with the name, the value and what is allowed.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Generic, TypeVar

from engines.types import AdapterOption
from server.errors import SettingsError
from server.origins import setting as origin

T = TypeVar("T")

PREFIX = "SPRINT_"

BACKENDS = ("auto", "eager", "compiled", "cuda-graph", "openvino", "tensorrt", "torch-tensorrt", "fake")
BUILT_BACKENDS = ("auto", "openvino", "tensorrt")  # what --engine auto may find or build
# Seconds, tuned for 20 to 400 ms.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0),
)
STAGE_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512),
    *(1.0, 2.0, 5.0, 10.0),
)


# Name of the Service, then what of it, then its value. SPRINT_PORT is a setting too: the value tells them apart.
LINK = re.compile(
    r"(SPRINT(?:_[A-Z0-9_]+?)?)_(?:SERVICE_HOST=.*|SERVICE_PORT(?:_[A-Z0-9_]+)?=.*|PORT=(?:tcp|udp|sctp)://.*"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?=.*)"
)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """How the text of a setting becomes a value (ValueError where it does not), and what is allowed, in words."""

    parse: Callable[[str], T]
    allowed: str


def whole(low: int, high: int) -> Kind[int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind(parse, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Kind[float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind(parse, f"a number from {low:g} to {high:g}")


def one_of(*names: str) -> Kind[str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return Kind(parse, ", ".join(names))


def text(allowed: str) -> Kind[str]:
    def parse(value: str) -> str:
        if not value.strip():
            raise ValueError(value)
        return value

    return Kind(parse, allowed)


def origins() -> Kind[tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        return tuple(origin(name.strip()) for name in value.split(",") if name.strip())

    return Kind(parse, "origins such as https://example.org or tauri://localhost (no path) separated by commas, or *")


def sizes() -> Kind[tuple[tuple[int, int], ...]]:
    def parse(value: str) -> tuple[tuple[int, int], ...]:
        found = []
        for size in value.split(","):
            width, height = (int(side) for side in size.strip().split("x"))
            if min(width, height) <= 0:
                raise ValueError(value)
            found.append((width, height))
        return tuple(found)

    return Kind(parse, "sizes such as 1024x1024,512x512 in pixels, width x height")


def switch() -> Kind[bool]:
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}

    def parse(value: str) -> bool:
        if value.lower() not in words:
            raise ValueError(value)
        return words[value.lower()]

    return Kind(parse, "yes or no")


def adapters() -> Kind[tuple[AdapterOption, ...]]:
    def parse(value: str) -> tuple[AdapterOption, ...]:
        return tuple(AdapterOption.parse(part) for part in value.split(",") if part.strip())

    return Kind(parse, "NAME=PATH or NAME=PATH:SCALE, several separated by commas")


def buckets() -> Kind[tuple[float, ...]]:
    def parse(value: str) -> tuple[float, ...]:
        bounds = tuple(float(part) for part in value.replace(",", " ").split())
        rising = all(low < high for low, high in pairwise(bounds))
        if not bounds or not rising or bounds[0] <= 0 or not math.isfinite(bounds[-1]):
            raise ValueError(value)
        return bounds

    return Kind(parse, "rising positive seconds separated by commas or spaces")


def some_of(*names: str) -> Kind[tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in value.split(",") if name.strip())
        if not found or set(found) - set(names):
            raise ValueError(value)
        return found

    return Kind(parse, "separated by commas, of " + ", ".join(names))


def assignments(*names: str) -> Kind[tuple[tuple[str, str], ...]]:
    """NAME=VALUE, each name at most once; a value may hold commas that no name follows."""

    def parse(value: str) -> tuple[tuple[str, str], ...]:
        parts = re.split(rf"(?:^|,)({'|'.join(names)})=", value)
        found = tuple(zip(parts[1::2], parts[2::2], strict=True))
        if parts[0] or not found or len({name for name, _ in found}) < len(found) or not all(told for _, told in found):
            raise ValueError(value)
        return found

    return Kind(parse, " and ".join(f"{name}=..." for name in names) + " separated by commas")


def setting(default: T, kind: Kind[Any], explanation: str) -> T:
    """A field of Settings: typed as its default, so that the dataclass reads like one."""
    value: T = field(default=default, metadata={"kind": kind, "help": explanation})
    return value


@dataclass(frozen=True, slots=True)
class Settings:
    """What `python -m server` can be told."""

    model: str = setting("tiny", text("a folder, a hub id or a short name"), "checkpoint in the diffusers layout")
    engine: str | None = setting(
        None,
        text("auto, none, or a folder that build_engine.py wrote"),
        "built engines; auto finds or builds what fits, none runs PyTorch; default: auto on a GPU, none without",
    )
    engine_sizes: tuple[tuple[int, int], ...] = setting(
        (), sizes(), "what --engine auto builds for; default: the checkpoint's sizes"
    )
    serve_while_building: bool = setting(False, switch(), "make images by PyTorch until --engine auto has built")
    backend: str = setting("auto", one_of(*BACKENDS), "how the modules are executed; auto decides and says why")
    cache: str | None = setting(
        None,
        text("a folder"),
        "what was built and compiled here is kept in it; default: sana-sprint in the user's cache",
    )
    precision: str = setting(
        "auto", one_of("auto", "fp32", "bf16", "int8", "fp8"), "of the arithmetic; auto decides and says why"
    )
    device: str = setting("auto", one_of("auto", "cpu", "cuda"), "where the modules run; auto decides and says why")
    decoder: str | None = setting(None, text("a folder or a hub id"), "another autoencoder with the same latents")
    variant: str | None = setting(
        None, text("a name such as fp16"), "weights to take where the checkpoint has several; default: the plain ones"
    )
    controlnet: str | None = setting(
        None, text("a folder or a hub id"), "what drawings steer it with; default: controlnet/ in the checkpoint"
    )
    lora: tuple[AdapterOption, ...] = setting(
        (), adapters(), "adapters, repeats; with a scale fused at start, without one for requests to choose"
    )
    host: str = setting("127.0.0.1", text("a name or an address"), "where to listen")
    port: int = setting(8000, whole(0, 65535), "where to listen; 0 takes a free port")
    workers: int = setting(
        1, whole(1, 64), "processes behind the port, one for each GPU; limits such as max-queue are each one's own"
    )
    max_batch: int = setting(8, whole(1, 64), "most jobs in one batch")
    max_queue: int = setting(128, whole(1, 100_000), "most jobs that may wait; more are refused at once with 429")
    timeout_ms: int = setting(
        30_000, whole(1, 3_600_000), "a job that has not begun by then gets 504; requests may say less or more"
    )
    api_key_file: str | None = setting(
        None, text("a file"), "one key a line, plain or sha256:<hex>; read again when it changes"
    )
    body_limit_mib: float = setting(24.0, number(0.001, 1024), "largest request body")
    body_timeout_s: float = setting(30.0, number(0.01, 3600), "a body that has not arrived by then gets 408")
    codec_threads: int = setting(2, whole(1, 64), "threads that decode and encode images")
    batch_timeout_s: float = setting(
        300.0, number(0.05, 86_400), "a batch that runs longer means a hung engine: not ready, then exit 70"
    )
    drain_delay_s: float = setting(
        0.0, number(0, 3600), "after SIGTERM, go on listening at least this long, so that a balancer sees 503"
    )
    shutdown_timeout_s: float = setting(
        30.0, number(0, 3600), "after SIGTERM, answer what was accepted within this time"
    )
    live_sessions: int = setting(64, whole(1, 100_000), "most people who may draw at the same time, on /v1/live")
    live_idle_s: float = setting(120.0, number(0.05, 86_400), "a live session without a message for so long ends")
    cors_origins: tuple[str, ...] = setting((), origins(), "origins whose pages may call this server; none by default")
    compat: tuple[str, ...] = setting((), some_of("sdapi"), "APIs of other servers to answer to; none by default")
    safety: tuple[tuple[str, str], ...] = setting(
        (),
        assignments("prompt", "image"),
        "what checks prompts (a file of words) and images (opennsfw); off by default",
    )
    otlp_endpoint: str | None = setting(
        None, text("an address such as http://collector:4318"), "where traces go, by OTLP over HTTP; none by default"
    )
    log_format: str = setting("text", one_of("text", "json"), "how log lines look")
    log_level: str = setting("info", one_of("debug", "info", "warning", "error"), "least severe line that is logged")
    request_buckets: tuple[float, ...] = setting(REQUEST_BUCKETS, buckets(), "histogram of request durations, seconds")
    stage_buckets: tuple[float, ...] = setting(STAGE_BUCKETS, buckets(), "histogram of stage durations, seconds")
    fake_delay_ms: float = setting(0.0, number(0, 600_000), "how long a batch takes with --backend fake")

    @property
    def body_limit(self) -> int:
        """Bytes."""
        return int(self.body_limit_mib * 2**20)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def parser() -> argparse.ArgumentParser:
    """The command line, one flag for each field of Settings. Values are parsed by `read`, not here."""
    command = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves a SANA-Sprint checkpoint over HTTP. Every flag is also SPRINT_<FLAG> in the environment.",
        allow_abbrev=False,
    )
    for item in fields(Settings):
        kind: Kind[Any] = item.metadata["kind"]
        shown = item.default if not isinstance(item.default, tuple) else ",".join(map(str, item.default))
        suffix = "" if shown in (None, "", False) else f" (default {shown})"
        explanation = f"{item.metadata['help']}: {kind.allowed}{suffix}".replace("%", "%%")
        bare: dict[str, Any] = {"nargs": "?", "const": "yes"} if isinstance(item.default, bool) else {}
        repeats = "append" if item.name == "lora" else "store"
        command.add_argument(flag_of(item.name), metavar="VALUE", action=repeats, help=explanation, **bare)
    return command


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from the command line and the environment.

    Raises SettingsError; an unknown flag exits with code 2, as argparse does.
    """
    given = vars(parser().parse_args(arguments))
    known = {variable_of(item.name): item.name for item in fields(Settings)}
    for variable, value in environment.items():
        link = LINK.fullmatch(f"{variable}={value}")
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
        source, raw = flag_of(item.name), given[item.name]
        if raw is None:
            source, raw = variable_of(item.name), environment.get(variable_of(item.name)) or None
        if raw is None:
            continue
        if isinstance(raw, list):
            raw = ",".join(raw)
        kind: Kind[Any] = item.metadata["kind"]
        try:
            values[item.name] = kind.parse(raw)
        except ValueError as error:
            raise SettingsError(f"{source}: got {raw!r}, allowed: {kind.allowed}") from error
    settings = Settings(**values)
    if settings.engine == "auto" and settings.backend not in BUILT_BACKENDS:
        raise SettingsError(
            f"--engine: got 'auto' with --backend {settings.backend}, which runs no built engine; allowed with it: "
            f"{', '.join(BUILT_BACKENDS)}"
        )
    return settings
