"""Required figures of a card: each row compares a measured figure with its bar."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.summary import table


@dataclass(frozen=True)
class Facts:
    """http: lines of bench.acceptance.over_http; stages: steps of bench.acceptance; steps: each program's end."""

    http: Sequence[dict[str, Any]] = ()
    stages: Sequence[dict[str, Any]] = ()
    steps: Sequence[dict[str, Any]] = field(default=())

    @classmethod
    def read(cls, out: Path, work: Path) -> "Facts":
        stages = [
            step for path in sorted(out.glob("latency-*/*.json")) for step in json.loads(path.read_text())["steps"]
        ]
        steps = [*_lines([work / "built.jsonl"]), *_lines([out / "steps.jsonl"])]
        return cls(list(_lines(sorted(out.glob("http/*.jsonl")))), stages, steps)

    def to_dict(self) -> dict[str, Any]:
        return {"http": list(self.http), "stages": list(self.stages), "steps": list(self.steps)}

    def over_http(self, model: str, precision: str, name: str, *, native: bool = False) -> dict[str, Any]:
        """Returns the last figure of that name; empty without one."""
        found = [
            line
            for line in self.http
            if line["name"] == name
            and "error" not in line
            and (line["about"]["model"], line["about"]["precision"]) == (model, precision)
            and ("engine" in line["about"]) == native
        ]
        return found[-1] if found else {}

    def engine(self, model: str, who: str) -> float | None:
        """Returns median milliseconds of one image in one step, without HTTP.

        who: ours, diffusers or diffusers-compiled.
        """
        rows = [row for step in self.stages if step["model"] == model for row in step["rows"]]
        found = [
            row["seconds"]["total"]["p50"] * 1e3
            for row in rows
            if "seconds" in row and (row["who"], row["batch"], row["steps"]) == (who, 1, 1)
        ]
        return found[-1] if found else None


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        if path.exists():
            yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


Value = float | None
Of = Callable[[Facts, str], Value]


@dataclass(frozen=True)
class Bar:
    """A row: its value may be at most `bar`, or at least `bar` where `least` is set."""

    what: str
    bar: float
    of: Of
    least: bool = False

    def verdict(self, value: Value) -> str:
        if value is None:
            return "-"
        return "held" if (value >= self.bar if self.least else value <= self.bar) else "missed"


def _get(found: Mapping[str, Any], *keys: str) -> Value:
    """Returns a nested number of a document; None where a key is missing."""
    value: Any = found
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _number(precision: str, name: str, *keys: str, native: bool = False) -> Of:
    return lambda facts, model: _get(facts.over_http(model, precision, name, native=native), *keys)


def _ratio(above: Of, below: Of) -> Of:
    def of(facts: Facts, model: str) -> Value:
        one, other = above(facts, model), below(facts, model)
        return None if one is None or not other else one / other

    return of


def _scaled(of: Of, factor: float) -> Of:
    def scaled(facts: Facts, model: str) -> Value:
        value = of(facts, model)
        return None if value is None else value * factor

    return scaled


def _both(one: Of, other: Of) -> Of:
    def both(facts: Facts, model: str) -> Value:
        values = one(facts, model), other(facts, model)
        return None if None in values else sum(value for value in values if value is not None)

    return both


def _engine(who: str) -> Of:
    return lambda facts, model: facts.engine(model, who)


def bars(precisions: Sequence[str]) -> list[Bar]:
    """Returns the rows of the first precision and, if it is among `precisions`, of fp8.

    Values are milliseconds where the row names no other unit.
    """
    plain = precisions[0]
    jpeg = _number(plain, "jpeg alone", "ms", "p50")
    rows = [
        Bar("text", 3.0, _number(plain, "jpeg alone", "stages", "text")),
        Bar("denoise", 4.5, _number(plain, "jpeg alone", "stages", "denoise")),
        Bar("text, fp8", 3.0, _number("fp8", "jpeg alone", "stages", "text")),
        Bar("denoise, fp8", 4.5, _number("fp8", "jpeg alone", "stages", "denoise")),
        Bar(f"decode, {plain}", 15, _number(plain, "jpeg alone", "stages", "decode")),
        Bar("decode, fp8", 11, _number("fp8", "jpeg alone", "stages", "decode")),
        Bar(f"over HTTP, JPEG, p50, {plain}", 24, jpeg),
        Bar("over HTTP, JPEG, p50, fp8", 20, _number("fp8", "jpeg alone", "ms", "p50")),
        Bar("p99 over p50, one client", 1.15, _ratio(_number(plain, "jpeg alone", "ms", "p99"), jpeg)),
        Bar("engine, times diffusers compiled", 5, _ratio(_engine("diffusers-compiled"), _engine("ours")), least=True),
        Bar("engine, times diffusers eager", 10, _ratio(_engine("diffusers"), _engine("ours")), least=True),
        Bar(f"pictures a second, 32 clients, {plain}", 55, _number(plain, "closed loop 32", "per_second"), least=True),
        Bar("pictures a second, 32 clients, fp8", 70, _number("fp8", "closed loop 32", "per_second"), least=True),
        Bar(
            "mean time to a picture, 8 at once, over one alone",
            4.2,
            _ratio(_number(plain, "8 at once", "mean_ms"), jpeg),
        ),
        Bar("first request after ready, over p50", 1.3, _ratio(_number(plain, "first request", "ms", "p50"), jpeg)),
        Bar("ready with a native engine, s", 12, _number(plain, "ready", "seconds", native=True)),
        Bar(
            "memory at batch 8, GB",
            14,
            _scaled(_number(plain, "memory", 'sana_sprint_gpu_memory_bytes{kind="used"}'), 1e-9),
        ),
        Bar("ControlNet, over HTTP, p50", 35, _number(plain, "controlnet alone", "ms", "p50")),
        Bar("2 steps, over HTTP, p50", 29, _number(plain, "2 steps alone", "ms", "p50")),
        Bar("4 steps, over HTTP, p50", 38, _number(plain, "4 steps alone", "ms", "p50")),
        Bar("launches outside of graphs, counted", 15, _number(plain, "projected", "launches_outside_graphs")),
        Bar(
            "pageable copies and waits, counted",
            2,
            _both(_number(plain, "projected", "transfers", "pageable"), _number(plain, "projected", "waits")),
        ),
    ]
    return rows if "fp8" in precisions else [row for row in rows if "fp8" not in row.what]


def show(facts: Facts, models: Sequence[str], about: Mapping[str, Any], *, held: bool) -> str:
    """Returns the page in Markdown. held: the figures are a card's, and bars hold for the first model."""
    first = models[0]
    precisions = ("bf16", "fp8") if held else ("fp32",)
    rows = []
    for bar in bars(precisions):
        values = [bar.of(facts, model) for model in models]
        words = "at least" if bar.least else "at most"
        rows.append([bar.what, f"{words} {bar.bar:g}", *values, bar.verdict(values[0]) if held else "-"])
    told = about["machine"]
    ended = {line["name"]: line for line in facts.steps}
    steps = [[name, line.get("seconds"), str(line.get("error", "done"))[:160]] for name, line in ended.items()]
    steps += [[name, None, f"left out: {why}"] for name, why in about["skipped"].items()]
    return (
        "\n\n".join(
            [
                f"# Acceptance on {about['card']}",
                f"{told['date']}, revision {told['revision']}, torch {told['torch']}, Python {told['python']}",
                *(
                    []
                    if held
                    else ["A rehearsal: the tiny checkpoint on a CPU. No figure here is a card's, and no bar holds."]
                ),
                f"Medians of {first}; milliseconds where nothing else is said.",
                table(("what", "bar", *models, "verdict"), rows),
                table(
                    ("step", "s", "ended"),
                    [[name, seconds, str(end).replace("|", "/")] for name, seconds, end in steps],
                ),
            ]
        )
        + "\n"
    )
