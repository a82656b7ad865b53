"""docs/understand/gpu-proof.md lists every file with lines that only a GPU runs, and a test for the card that reaches
them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONLY_THERE = re.compile(r"\btorch\.cuda\.(?!OutOfMemoryError)|== \"cuda\"|!= \"cuda\"|device\(\"cuda\"\)|!= \"cpu\"")

# Speaks of a card that is not there: all of it runs, and is tested, without one (tests/bench/budget).
STAND_IN = ROOT / "bench" / "budget"


def listed() -> dict[str, list[str]]:
    """File -> tests, from the page's table of lines that only a GPU runs."""
    page = (ROOT / "docs" / "understand" / "gpu-proof.md").read_text()
    section = page.split("## Lines that only a GPU runs", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {
        file: re.findall(r"`(tests/[\w/.]+)`", tests)
        for files, tests in rows
        for file in re.findall(r"`([\w/.]+\.py)`", files)
    }


def test_every_file_that_asks_for_a_gpu_is_listed() -> None:
    files = [path for room in ("engines", "bench", "server") for path in (ROOT / room).rglob("*.py")]
    real = [path for path in files if STAND_IN not in path.parents]
    asking = {str(path.relative_to(ROOT)) for path in real if ONLY_THERE.search(path.read_text())}
    assert len(asking) > 5
    assert asking - set(listed()) == set()


def test_every_listed_test_is_for_the_card() -> None:
    tests = {test for found in listed().values() for test in found}
    assert all(found for found in listed().values())
    assert [test for test in tests if "pytest.mark.gpu" not in (ROOT / test).read_text()] == []
