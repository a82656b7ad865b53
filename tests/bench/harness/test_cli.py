"""bench.harness.cli: output and exit code of a benchmark."""

import json

import pytest

from bench.harness.cli import BenchmarkParser, comma_list, run_benchmark
from bench.harness.errors import BenchError


@pytest.mark.parametrize(("figure", "code"), [(1, 0), (7, 1)])
def test_a_table_then_one_document_and_what_was_found_decides(
    figure: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"figure": figure}
    assert (
        run_benchmark(
            lambda: figures, lambda result: f"figure: {result['figure']}", lambda result: result["figure"] > 5
        )
        == code
    )
    printed = capsys.readouterr()
    table, document = printed.out.splitlines()
    assert table == f"figure: {figure}"
    assert json.loads(document) == figures
    assert printed.err == ""


def test_what_cannot_be_measured_is_one_line_and_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> dict[str, object]:
        raise BenchError("device: got none, needed is one")

    assert run_benchmark(measure, str) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: device: got none, needed is one\n"


def test_options_hold_the_line_that_repeats_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    parser = BenchmarkParser("bench.example", "An example.")
    parser.add_argument("--steps", type=comma_list(int, (1, 2, 4)), default="1")
    options = parser.options(["--steps", "1,4"])
    assert (options.steps, options.command) == ((1, 4), "python -m bench.example --steps 1,4")
    assert parser.options([]).steps == (1,)
    with pytest.raises(SystemExit):
        parser.options(["--steps", "3"])
    assert "got '3', allowed are 1, 2, 4" in capsys.readouterr().err
