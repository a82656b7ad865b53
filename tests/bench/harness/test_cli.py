"""How a program that measures ends: what it prints where, and its exit code."""

import json

import pytest

from bench.harness.cli import told
from bench.harness.errors import BenchError


@pytest.mark.parametrize(("figure", "code"), [(1, 0), (7, 1)])
def test_a_table_then_one_document_and_what_was_found_decides(
    figure: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"figure": figure}
    assert told(lambda: given, lambda found: f"figure: {found['figure']}", lambda found: found["figure"] > 5) == code
    printed = capsys.readouterr()
    table, document = printed.out.splitlines()
    assert table == f"figure: {figure}"
    assert json.loads(document) == given
    assert printed.err == ""


def test_what_cannot_be_measured_is_one_line_and_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> dict[str, object]:
        raise BenchError("device: got none, needed is one")

    assert told(measure, str) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: device: got none, needed is one\n"
