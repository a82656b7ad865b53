"""bench.load.crowd: everything that is sent is answered, and every kind of loss counts."""

import json
from typing import Any

import pytest

from bench.load.crowd import is_lost, main


def document(**lost: int) -> dict[str, Any]:
    values = {"alone": 0, "beside": 0, "idle": 0, "drawings": 0, "broken": 0} | lost
    idle = {"lost": values["idle"], "alone": {"lost": values["alone"]}, "beside": {"lost": values["beside"]}}
    return {"idle": idle, "live": {"lost": values["drawings"], "broken": values["broken"]}}


@pytest.mark.parametrize("kind", ["alone", "beside", "idle", "drawings", "broken"])
def test_every_kind_of_loss_counts(kind: str) -> None:
    assert not is_lost(document())
    assert is_lost(document(**{kind: 1}))


def test_a_small_crowd_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--connections", "30", "--sessions", "5", "--drawings", "4", "--seconds", "0.5"]
    assert main(flags) == 0
    table, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "beside 30 idle connections" in table
    result = json.loads(last)
    assert (result["idle"]["lost"], result["live"]["lost"], result["live"]["broken"]) == (0, 0, 0)
    assert result["idle"]["beside"]["ms"]["count"] > 0
    assert result["live"]["ms"]["count"] == 5 * 2


def test_a_drawing_without_an_image_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.load.crowd.drawing_file", lambda _: (b"no image", None))
    monkeypatch.setattr("bench.load.crowd.PATIENCE_S", 0.3)
    assert main(["--connections", "1", "--sessions", "2", "--drawings", "2", "--seconds", "0.5"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["live"]["lost"] == 2
