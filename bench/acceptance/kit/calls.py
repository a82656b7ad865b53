"""The calls of a kit as steps; those worth most for their time come first. Imports no engine."""

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

SPACE_S = 10.0  # between a program's own time limit and its process's
STAGES = "bench.acceptance"
HTTP = "bench.acceptance.over_http"
PROJECTED = "projected"
READY = ("ready", "first request", "jpeg alone", "memory")


@dataclass(frozen=True)
class Place:
    """Folders and device of a call. work: for builds; out: for results; rehearsal: the tiny checkpoint on a CPU."""

    work: Path
    out: Path
    rehearsal: bool

    @property
    def models(self) -> tuple[str, ...]:
        return ("tiny",) if self.rehearsal else ("random:sprint-0.6b", "random:sprint-1.6b")

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32",) if self.rehearsal else ("bf16", "fp8")

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def backend(self) -> str:
        return "eager" if self.rehearsal else "cuda-graph"

    @property
    def patience(self) -> float:
        """Returns the factor of time limits: a rehearsal may share a CPU of two cores."""
        return 4.0 if self.rehearsal else 1.0

    def engine(self, precision: str) -> Path:
        return self.work / f"engine-{precision}"


@dataclass(frozen=True)
class Step:
    """A program with its time limit in seconds. It needs `modules`, `paths` and, if `card`, a GPU."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    modules: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    card: bool = False
    builds: bool = False  # into `work`; the others measure

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, *self.arguments)

    def lacks(self, place: Place) -> str | None:
        """Returns the reason why it cannot run here; None where it can."""
        if self.card and place.rehearsal:
            return "a rehearsal has no card"
        absent = [name for name in self.modules if find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        missing = [str(path) for path in self.paths if not path.exists()]
        return f"{', '.join(missing)} is not there" if missing else None


def http_call(place: Place) -> list[Step]:
    """Returns the steps that measure the server over HTTP: each precision, a ControlNet, the larger model, threads."""
    small, *larger = place.models
    branch = place.work / "controlnet"
    drawing = _http(
        *(place, f"http controlnet {place.precisions[-1]}", small, place.precisions[-1], 60),
        *("--controlnet", str(branch), "--figures", "controlnet alone,live"),
    )
    return [
        _kernels(place, small, 110),
        # In 8 bits first, which no card has measured as a whole.
        *(_http(place, f"http {precision}", small, precision, 100) for precision in reversed(place.precisions)),
        replace(_module("controlnet", "controlnet", 40, "--model", small, "--out", str(branch)), builds=True),
        replace(drawing, paths=(branch,)),
        *(_http(place, f"http {model} bf16", model, "bf16", 100) for model in larger),
        _threads(place, small, 60),
        _http(place, "counted", small, place.precisions[0], 60, "--figures", PROJECTED),  # needs no card
    ]


def engine_call(place: Place) -> list[Step]:
    """Returns the steps that time stages in each precision, alternatives of kernels, and eager diffusers."""
    small, *larger = place.models
    return [
        _kernels(place, small, 110),
        _precisions(place, small, 130),
        _module("alternatives", "alternatives", 60, "--device", place.device),
        _stages(place, small, f"latency {place.backend}", 90),
        _peer(place, small, "diffusers", 60),
        *(_precisions(place, model, 130) for model in larger),
    ]


def rest_call(place: Place) -> list[Step]:
    """Returns the steps that take minutes: compiled diffusers, native engines and their starts, the larger model."""
    small, *larger = place.models
    steps = [_peer(place, small, "diffusers-compiled", 200)]
    for precision in ("bf16",) if place.rehearsal else place.precisions:
        steps += [_build(place, small, precision, 210), _served(place, small, precision)]
    return [*steps, *(_stages(place, model, f"latency {place.backend}", 150) for model in larger)]


CALLS = {"http": http_call, "engine": engine_call, "rest": rest_call}


def _kernels(place: Place, model: str, limit_s: float) -> Step:
    """Returns the step that compiles kernels, which a server would compile one by one.

    A rehearsal compiles one in 32, for a card of capability 9.0.
    """
    share = ("--capability", "9.0", "--of", "32") if place.rehearsal else ()
    step = _module("kernels", "kernels", limit_s, "--model", model, "--cache", str(place.work / "triton"), *share)
    return replace(step, modules=("triton",), builds=True)


def _stages(place: Place, model: str, only: str, limit_s: float, modules: tuple[str, ...] = ()) -> Step:
    name = f"{only} {model}"
    batches, steps, runs = ("1", "1", "2") if place.rehearsal else ("1,8", "1,2,4", "15")
    if modules:  # diffusers: one image in one step
        batches, steps = "1", "1"
    arguments: tuple[str, ...]
    arguments = ("-m", STAGES, "--models", model, "--device", place.device, "--only", only, "--batches", batches)
    arguments += ("--steps", steps, "--runs", runs, "--precisions", "bf16", "--out", str(_folder(place, name)))
    return Step(name, arguments, limit_s, modules)


def _peer(place: Place, model: str, peer: str, limit_s: float) -> Step:
    return _stages(place, model, f"latency {peer}", limit_s, ("diffusers", "transformers"))


def _build(place: Place, model: str, precision: str, limit_s: float) -> Step:
    gpu = "h100" if place.rehearsal else "native"  # without a card: ahead of time
    arguments: tuple[str, ...]
    arguments = ("build_engine.py", "--model", model, "--vendor", "native", "--gpu", gpu, "--precision", precision)
    arguments += ("--out", str(place.engine(precision)), *(("--batches", "1") if place.rehearsal else ()))
    return Step(f"build native {precision}", arguments, limit_s, modules=("triton",), builds=True)


def _served(place: Place, model: str, precision: str) -> Step:
    folder = place.engine(precision)
    more = ("--figures", ",".join(READY))
    step = _http(place, f"served native {precision}", model, precision, 60, *more, engine=str(folder))
    return replace(step, paths=(folder,), card=True)


def _threads(place: Place, model: str, limit_s: float) -> Step:
    few = ("--runs", "1", "--rounds", "1") if place.rehearsal else ()
    return _module("threads", "threads", limit_s, "--model", model, "--device", place.device, *few)


def _precisions(place: Place, model: str, limit_s: float) -> Step:
    few = ("--precisions", "fp32,bf16", "--batches", "1", "--runs", "1") if place.rehearsal else ()
    step = _module("precisions", "precisions", limit_s, "--model", model, "--device", place.device, *few)
    return replace(step, name=f"precisions {model}")


def _http(
    place: Place, name: str, model: str, precision: str, limit_s: float, *more: str, engine: str = "none"
) -> Step:
    """Returns the step of bench.acceptance.over_http.

    engine: folder of built engines; "none" keeps a server on a GPU from building its own before it is ready.
    """
    arguments: tuple[str, ...]
    arguments = ("-m", HTTP, "--models", model, "--device", place.device, "--precisions", precision, "--peers", "")
    minutes = (limit_s - SPACE_S) * place.patience / 60
    arguments += ("--engine", engine, "--minutes", f"{minutes:g}", "--out", str(_folder(place, "http")), *more)
    arguments += () if PROJECTED in more else ("--skip", PROJECTED)
    return Step(name, (*arguments, "--quick") if place.rehearsal else arguments, limit_s)


def _module(name: str, module: str, limit_s: float, *arguments: str) -> Step:
    return Step(name, ("-m", f"bench.acceptance.kit.{module}", *arguments), limit_s)


def _folder(place: Place, name: str) -> Path:
    return place.out / name.replace(":", "-").replace(" ", "-")
