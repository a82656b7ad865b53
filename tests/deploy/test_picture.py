"""The dashboard drawn without Grafana: every panel, from series that are made up."""

import importlib
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "deploy/grafana"))
    return importlib.import_module("picture")


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_panel_is_drawn(picture: ModuleType) -> None:
    def fetch(query: str, legend: str) -> list[object]:
        bounds = ("0.5", "1", "+Inf") if "_bucket" in query else ("",)
        points = [(float(moment), 2.0 + moment) for moment in range(3)]
        return [
            picture.Series(picture.titled(legend, {}), {"le": bound, "instance": "a<b"}, points) for bound in bounds
        ]

    svg = picture.picture(fetch)
    said = texts(svg)
    assert [panel["title"] for panel in picture.dashboard.panels() if panel["title"] not in said] == []
    assert "p95" in said
    assert "no data" not in said
    assert any("instance a<b" in line for line in said)
    assert svg.count("<polyline") > 10


def test_nothing_measured_is_no_data(picture: ModuleType) -> None:
    assert texts(picture.picture(lambda *_: [])).count("no data") == 6


def test_buckets_are_drawn_without_the_smaller_ones(picture: ModuleType) -> None:
    series = [picture.Series("", {"le": bound}, [(0.0, 5.0)]) for bound in ("1", "+Inf")]
    drawn = [part for part in picture.heatmap(picture.Box(0, 0, 10, 10), series, "s") if part.startswith("<rect")]
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [(0.0123, "s", "12.3 ms"), (2, "s", "2 s"), (0.5, "percentunit", "50 %"), (3 * 2**30, "bytes", "3.0 GiB")],
)
def test_amounts_carry_their_unit(picture: ModuleType, value: float, unit: str, said: str) -> None:
    assert picture.amount(value, unit) == said
