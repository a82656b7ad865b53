"""Before its graphs are captured, an engine launches each tile of each kernel beside its reference."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from bench.budget.card import Card
from bench.budget.engine import _NoWeights
from engines.checkpoints.checkpoint import open_checkpoint
from engines.kernels.op import Launcher, Ops
from engines.loader import load_engine
from engines.pipeline.limits import shapes_of
from engines.pipeline.native import NativeBackend

Tile = tuple[str, tuple[tuple[str, object], ...]]  # a kernel's name and constants, by which it is compiled


@dataclass(frozen=True)
class _Seen(Launcher):
    """Launches nothing and notes the tiles."""

    tiles: set[Tile] = field(default_factory=set)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:  # noqa: ARG002  # of Launcher
        self.tiles.add((kernel.__name__, tuple(sorted(constants.items()))))


class _Comparing(NativeBackend):
    """Keeps what was launched until the end of the comparison."""

    compared: frozenset[Tile]

    def compare(self, work: Callable[[], object]) -> None:
        launcher = self.ops._launcher
        assert isinstance(launcher, _Seen)
        launcher.tiles.clear()
        work()
        self.compared = frozenset(launcher.tiles)

    def leave_out(self, *_: object) -> None:
        """Leaves out no product of 8 bits."""


@pytest.mark.parametrize(
    ("model", "precision", "sizes"),
    [
        ("random:sprint-0.6b", "bf16", ()),
        ("random:sprint-0.6b", "fp8", ()),
        ("random:sprint-1.6b", "bf16", ()),
        ("random:sprint-1.6b", "fp8", ()),
        ("random:sprint-0.6b", "bf16", ((1024, 1024), (256, 256), (1536, 640))),
    ],
)
def test_the_comparison_launches_each_tile_of_the_graphs(
    model: str, precision: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    """At the published widths, where a batch of eight, long texts and other sizes have tiles of their own."""
    whole = open_checkpoint(model)
    checkpoint = replace(
        whole,
        transformer=replace(whole.transformer, num_layers=2),
        text={**whole.text, "num_hidden_layers": 2},
        weights=_NoWeights(whole.weights),
    )
    card = Card("H100", 132, (9, 0))
    seen = _Seen(tma=True, processors=132)
    kernels = _Comparing(Ops(seen), checkpoint.autoencoder)
    with card.present():
        engine = load_engine(
            checkpoint, backend="cuda-graph", device="cuda", precision=precision, max_batch=8, recorder=card.recorder,
            native=kernels, sizes=sizes,
        )  # fmt: skip
        engine.warmup()
    later = seen.tiles - kernels.compared
    assert not later, f"a graph holds tiles that no reference was beside: {sorted(later)}"
    assert {"_widened_weight" if precision == "fp8" else "_convolution", "_gelu_gate"} <= {
        name for name, _ in seen.tiles
    }
    assert {"comparison", "graphs", "first images"} <= set(engine.info.start_s)


def test_a_controlnet_needs_a_comparison_of_its_own() -> None:
    checkpoint = open_checkpoint("random:sprint-0.6b")
    shapes = [shapes_of(checkpoint, ((1024, 1024),), "bf16", 8, None, control=control) for control in (False, True)]
    assert shapes[0] != shapes[1]
