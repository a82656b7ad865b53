"""docs/understand/gpu-proof.md lists every file with GPU-only lines, and a test on the card that reaches them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU_ONLY = re.compile(r"\btorch\.cuda\.(?!OutOfMemoryError)|== \"cuda\"|!= \"cuda\"|device\(\"cuda\"\)|!= \"cpu\"")

# Simulates a card, so that all of it runs and is tested without one (tests/bench/budget).
SIMULATION = ROOT / "bench" / "budget"


def listed() -> dict[str, list[str]]:
    """Returns the tests of each file, from the page's table of GPU-only lines."""
    page = (ROOT / "docs" / "understand" / "gpu-proof.md").read_text()
    section = page.split("## Lines that only a GPU runs", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {
        file: re.findall(r"`(tests/[\w/.]+)`", tests)
        for files, tests in rows
        for file in re.findall(r"`([\w/.]+\.py)`", files)
    }


def test_every_file_with_gpu_code_is_listed() -> None:
    files = [path for room in ("engines", "bench", "server") for path in (ROOT / room).rglob("*.py")]
    real = [path for path in files if SIMULATION not in path.parents]
    with_gpu_code = {str(path.relative_to(ROOT)) for path in real if GPU_ONLY.search(path.read_text())}
    assert len(with_gpu_code) > 5
    assert with_gpu_code - set(listed()) == set()


def test_every_listed_test_needs_the_card() -> None:
    tests = {test for tests in listed().values() for test in tests}
    assert all(tests for tests in listed().values())
    assert [test for test in tests if "pytest.mark.gpu" not in (ROOT / test).read_text()] == []
