"""Memory of a GPU by NVML, on a stand-in; empty without a GPU."""

import logging
import sys

import pytest
from fake_nvml import TOTAL, UUID, FakeNvml, install

from engines.device.memory import open_card


def test_used_and_total_are_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, FakeNvml(used=5))
    card = open_card(UUID)
    assert card is not None
    assert card.memory_bytes() == {"used": 5, "total": TOTAL}
    nvml.used = 7
    assert card.memory_bytes()["used"] == 7


def test_a_card_that_is_lost_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, FakeNvml())
    card = open_card(UUID)
    assert card is not None
    nvml.driver = False
    assert card.memory_bytes() == {}


@pytest.mark.parametrize("missing", ["package", "driver", "card"])
def test_where_there_is_none_nothing_is_said(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if missing == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        install(monkeypatch, FakeNvml(driver=missing != "driver"))
    assert open_card("another" if missing == "card" else UUID) is None
    assert caplog.records == []
