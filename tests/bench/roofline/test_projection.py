"""bench.roofline: counted work against hand-worked cases and torch's counter; every line says that it projects."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.svg_chart import Bar, stacked_bars
from bench.roofline.__main__ import main
from bench.roofline.gpu_specs import H100, Device
from bench.roofline.op_counter import Call, count
from bench.roofline.projection import PEAK, Efficiency, eager_seconds, seconds, workloads
from engines.checkpoints.checkpoint import open_checkpoint

META = torch.device("meta")
PLAIN = Device("plain", {"16bit": 1000.0, "fp8": 2000.0}, vector=100.0, bandwidth=10.0, source="")


def test_a_product_and_what_follows_it() -> None:
    x, weight = torch.empty(4, 8, device=META), torch.empty(16, 8, device=META)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            calls = count(lambda: F.relu(F.linear(x, weight)).view(64))
        assert [call.kind for call in calls] == ["product", "other"]  # views and transpositions cost nothing
        assert (calls[0].operations, calls[0].read, calls[0].written) == (2 * 4 * 8 * 16, (4 * 8 + 16 * 8) * 4, 256)
        assert (calls[1].operations, calls[1].read, calls[1].written) == (0, 256, 256)


def test_an_expanded_tensor_is_read_once() -> None:
    x = torch.empty(1, 8, device=META).expand(100, 8)
    (call,) = count(lambda: x + 1)
    assert (call.read, call.written) == (32, 3200)


def test_convolutions_channel_by_channel_are_told_apart() -> None:
    x = torch.empty(1, 8, 5, 5, device=META)
    weights = {groups: torch.empty(8, 8 // groups, 3, 3, device=META) for groups in (1, 2, 8)}
    result = {groups: count(lambda g=groups: F.conv2d(x, weights[g], padding=1, groups=g))[0] for groups in weights}
    assert [call.kind for call in result.values()] == ["product", "product", "depthwise"]
    assert [call.operations for call in result.values()] == [2 * 25 * 9 * 64, 2 * 25 * 9 * 32, 2 * 25 * 9 * 8]


def call(operations: int, read: int, written: int, **other: object) -> Call:
    fields: dict[str, object] = {"name": "aten.mm", "kind": "product", "dtype": torch.bfloat16} | other
    return Call(operations=operations, read=read, written=written, **fields)  # type: ignore[arg-type]  # as given


def test_each_call_takes_as_long_as_its_arithmetic_or_its_traffic() -> None:
    busy, streaming = call(5000, 10, 10), call(1000, 60, 40)
    assert seconds([busy, streaming], PLAIN, PEAK) == 5.0 + 10.0
    assert seconds([busy, streaming], PLAIN, Efficiency(0.5, 0.5)) == 10.0 + 20.0
    assert seconds([busy, streaming], PLAIN, PEAK, eight_bit=True) == 2.5 + 7.0
    assert seconds([call(500, 1, 1, dtype=torch.float32)], PLAIN, PEAK, eight_bit=True) == 5.0
    assert seconds([call(500, 60, 40, dtype=torch.float32)], PLAIN, PEAK, eight_bit=True) == 10.0
    assert seconds([call(500, 1, 1, kind="depthwise")], PLAIN, PEAK, eight_bit=True) == 5.0
    other = call(0, 20, 20, kind="other")
    assert seconds([other], PLAIN, PEAK) == 0.0
    assert eager_seconds([busy, other], PLAIN, PEAK) == 5.0 + 4.0
    assert eager_seconds([other] * 3, H100, Efficiency(launch=5e-6)) == pytest.approx(15e-6)


def test_work_of_the_published_sizes() -> None:
    """Against the counts of this project's notes: 8.37 TFLOP to decode, 1.12 per step (at 300 text tokens)."""
    checkpoint = open_checkpoint("random:sprint-0.6b")
    calls = workloads(checkpoint, (1024, 1024), 2, 1, 299)
    work = {stage: sum(call.operations for call in stage_calls) for stage, stage_calls in calls.items()}
    assert work["decode upstream"] / 1e9 == pytest.approx(8369, rel=0.01)
    assert 0.9e12 < work["decode upstream"] - work["decode"] < 1.1e12  # upsampling folded: 16 of 36 taps are left
    assert work["denoise"] / 1e9 == pytest.approx(2 * 1121, rel=0.01)
    assert work["text upstream"] / 4.05e9 == pytest.approx(500, rel=0.05)
    short = workloads(checkpoint, (256, 256), 1, 3, 20)
    assert sum(call.operations for call in short["text"]) < sum(call.operations for call in short["text upstream"]) / 20
    with torch.device("meta"):
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 8, 3, groups=8))
        x = torch.empty(2, 3, 20, 20)
    with FlopCounterMode(display=False) as counter:
        body(x)
    assert sum(call.operations for call in count(lambda: body(x))) == counter.get_total_flops()


def test_every_line_says_projection(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(folder), "--batch", "2", "--plot", str(tmp_path / "plot.svg")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.strip("|- ") and "projection" not in line] == []
    result = json.loads(last)
    assert result["projection"]
    assert all(row["projection"] for row in result["rows"])
    assert all(row["floor"] <= row["projected"] for row in result["rows"])
    assert {row["paper"] for row in result["rows"]} == {None}  # it says nothing of this size
    assert "Projection" in (tmp_path / "plot.svg").read_text()


def test_the_paper_stands_beside_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "random:sprint-1.6b"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    (decode,) = [row for row in rows if (row["device"], row["stage"]) == ("A100 SXM 80GB", "decode upstream")]
    assert decode["paper"] == "120"
    assert 0.5 < decode["eager_over_paper"] < 1.5


def test_bars_are_drawn_to_scale() -> None:
    chart = ElementTree.fromstring(
        stacked_bars("a & b", "ms", [Bar("one", {"x": 1.0, "y": 3.0}), Bar("two", {"x": 2.0})])
    )
    rectangles = [element for element in chart if element.tag.endswith("rect")][-3:]
    widths = [float(element.attrib["width"]) for element in rectangles]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.01)
    assert 300 < sum(widths[:2]) < 600  # the longest bar fills its field
    assert [element.text for element in chart if element.text and element.text.endswith(" ms")] == ["4 ms", "2 ms"]
