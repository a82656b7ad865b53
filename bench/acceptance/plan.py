"""The config of an acceptance run of one checkpoint, and the result of a step. Imports no engine."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench.harness.errors import BenchError

Outcome = Literal["passed", "failed", "skipped"]


class SkippedError(BenchError):
    """A step lacks something that it needs; the message names it."""


@dataclass(frozen=True)
class AcceptanceConfig:
    """The checkpoint under acceptance, and the cases to run. Sizes are (width, height) in pixels."""

    model: str
    device: torch.device
    engines: Path  # folder for built engines
    precisions: tuple[str, ...]
    size: tuple[int, int]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    runs: int
    backends: tuple[str, ...]  # of ours, without built engines
    peers: tuple[str, ...]
    only: tuple[str, ...] = ()  # names of steps; empty: all

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def folder(self, precision: str) -> Path:
        return self.engines / f"{Path(self.model).name.replace(':', '-')}-{precision}"


@dataclass
class StepResult:
    """The outcome of one step. figures: facts by name; rows: one measurement for each case."""

    model: str
    name: str
    outcome: Outcome = "passed"
    reason: str | None = None
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
