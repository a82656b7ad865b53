"""What bench.acceptance is to do with one checkpoint, and how each step of it went. Knows no engine."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench.harness.errors import BenchError

Outcome = Literal["passed", "failed", "skipped"]


class SkippedError(BenchError):
    """What a step needs is not here; the message says what."""


@dataclass(frozen=True)
class AcceptanceConfig:
    """What is accepted, and how thoroughly. Sizes in pixels, width first."""

    model: str
    device: torch.device
    engines: Path  # folder for what is built
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
    """How one step went. figures: what it found; rows: measurements."""

    model: str
    name: str
    outcome: Outcome = "passed"
    reason: str | None = None
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
