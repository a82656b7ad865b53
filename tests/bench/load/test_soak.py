"""bench.load.soak: a short one finds nothing wrong; growth, slow responses and wrong images are found."""

import json
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.harness.http_client import HttpResponse
from bench.load.soak.__main__ import main
from bench.load.soak.counters import Counters
from bench.load.soak.process import ProcessState
from bench.load.soak.report import Span, verdict
from bench.load.soak.requests import KINDS, SoakRequest, drawing_file, random_request
from engines.fake import expected_pixels
from engines.types import Job
from server.generation.image_codec import encode

FIRST, LAST = Span(0, 10), Span(10, 20)


def states(memory: int = 0, files: int = 0, threads: int = 0) -> list[ProcessState]:
    """Twenty seconds; the second half holds so much more than the first."""
    calm = ProcessState(0.0, 100 * 2**20, 10, 5, 0.0)
    grown = ProcessState(0.0, 100 * 2**20 + memory, 10 + files, 5 + threads, 0.0)
    return [replace(calm if at < 10 else grown, at=float(at)) for at in range(20)]


def ledger(slower: float = 1.0) -> Counters:
    result = Counters()
    for at in range(20):
        result.add_latency(at, "plain", 0.03 * (1.0 if at < 10 else slower))
    return result


def test_a_short_soak_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak"
    flags = ["--hours", "0.0025", "--warmup-minutes", "0.01", "--rate", "20", "--fault-every-s", "0.5"]
    main([*flags, "--out", str(out)])  # growth within seconds says nothing, so its exit code says nothing
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["lost"] == {}, printed
    assert {"plain: 200", "live: 200"} <= set(result["seen"])
    lines = [json.loads(line) for line in (out / "soak.jsonl").read_text().splitlines()]
    assert lines[-1] == result
    assert all(row["memory_mib"]["min"] > 0 and row["threads"]["min"] > 0 for row in lines[:-1])
    ElementTree.parse(out / "soak.svg")


def test_a_folder_with_another_soak_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "soak.jsonl").write_text("")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "needed is a new folder" in capsys.readouterr().err


def test_nothing_that_grows_is_no_finding() -> None:
    assert verdict(states(), ledger(), FIRST, LAST)["broken"] == []


@pytest.mark.parametrize(
    ("seen", "times", "message"),
    [
        (states(memory=3 * 2**20), ledger(), "memory grew by 3.00%"),
        (states(files=9), ledger(), "9 more files"),
        (states(threads=1), ledger(), "1 more threads"),
        (states(), ledger(slower=1.1), "latency grew by 10.00%"),
        (states(), Counters(), "no request of the kind plain"),
    ],
)
def test_what_grows_is_found(seen: list[ProcessState], times: Counters, message: str) -> None:
    (finding,) = verdict(seen, times, FIRST, LAST)["broken"]
    assert message in finding


def test_what_was_lost_is_found() -> None:
    result = ledger()
    result.count("plain", "silence", ("200",))
    (finding,) = verdict(states(), result, FIRST, LAST)["broken"]
    assert finding.startswith("1 lost or wrong")


def test_every_kind_of_request_is_drawn() -> None:
    rng = random.Random(0)
    drawn = [random_request(rng) for _ in range(600)]
    assert {item.path for item in drawn} >= {"/generate", "/v1/images/generations", "/v1/images/edits", "/v1/info", "/"}
    assert len({item.kind for item in drawn}) > len(KINDS)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_image_of_another_job_is_found(kind: str) -> None:
    job, other = Job("a moon", 1, 64, 64), Job("a moon", 2, 64, 64)
    expected = SoakRequest("plain", "POST", "/generate", jobs=(job,))
    headers = {"content-type": f"image/{kind}"}
    answers = [HttpResponse(200, headers, encode(expected_pixels(item), kind, 90)) for item in (job, other)]  # type: ignore[arg-type]
    assert [expected.label(answer) for answer in answers] == ["200", "200 wrong image"]


def test_a_drawing_is_the_file_of_its_pixels() -> None:
    file, pixels = drawing_file(random.Random(0))
    assert file.startswith(b"\x89PNG")
    assert pixels.any()
