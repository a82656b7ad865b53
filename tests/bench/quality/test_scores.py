"""bench.quality: all variants get the same captions and are compared with the first."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bench import report
from bench.quality.__main__ import main


def test_variants_and_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = "eager:fp32,diffusers:fp32,eager:bf16"
    arguments = ["--model", str(folder), "--variants", variants, "--steps", "1,3", "--prompts", "6", "--max-batch", "4"]
    assert main([*arguments, "--schedule", "diffusers", "--latency-runs", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["variant"], row["steps"]): row for row in result["rows"]}
    assert list(rows) == [(variant, steps) for variant in variants.split(",") for steps in (1, 3)]
    for steps in (1, 3):
        assert rows["eager:fp32", steps]["max_abs"] == 0
        assert rows["diffusers:fp32", steps]["max_abs"] <= 1
        assert rows["eager:bf16", steps]["max_abs"] > 1
    assert all(row["mean"] == 0 for row in result["rows"])  # this checkpoint draws noise


def test_pairs_schedules_latency_and_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "model", symlinks=True)
    sheet = tmp_path / "worst.png"
    line = ["--model", str(tmp_path / "model"), "--variants", "eager:fp32,emulated:fp16", "--steps", "1,2"]
    more = [
        "--schedule",
        "paper,figures",
        "--prompts",
        "6",
        "--seeds",
        "2",
        "--latency-runs",
        "2",
        "--worst",
        str(sheet),
    ]
    assert main([*line, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["variant"], row["steps"], row["schedule"]): row for row in result["rows"]}
    combinations = [(1, "paper"), (1, "figures"), (2, "paper")]  # two steps start alike in both
    assert list(rows) == [(name, *rest) for name in ("eager:fp32", "emulated:fp16") for rest in combinations]
    first, figures_row, rounded = (
        rows["eager:fp32", 1, "paper"],
        rows["eager:fp32", 1, "figures"],
        rows["emulated:fp16", 1, "paper"],
    )
    assert (first["psnr_db"], first["max_abs"], first["changed"], first["apart"]) == (None, 0, 0, [0, 0, 0])
    assert 5 < figures_row["psnr_db"] < rounded["psnr_db"]
    assert rounded["worst_psnr_db"] <= rounded["psnr_db"] < 90
    assert first["seconds"] > 0
    assert first["ratio"][1] <= first["ratio"][0] <= first["ratio"][2]
    assert rounded["seconds"] is rounded["ratio"] is None
    with Image.open(sheet) as image:
        assert image.size == (4 * 272, 3 * 170)  # of the first variant's other schedule, and of both of the second's
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "quality-small.json").write_text(json.dumps(result))
    assert report.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "quality.md").read_text()
    assert "![the worst images of each variant](worst.png)" in page
    assert f"| {rounded['psnr_db']:.4g} " in page
    assert "(quality.md)" in (tmp_path / "bench.md").read_text()


def no_images(*_: object) -> None:
    raise AssertionError("images were made again")


def test_a_stopped_comparison_continues_with_the_images_it_has(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--model", str(folder), "--steps", "1,2", "--prompts", "6", "--latency-runs", "0", "--keep", str(tmp_path)]

    def rows(variants: str) -> list[dict[str, object]]:
        assert main([*line, "--variants", variants]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        (tmp_path / "quality-small.json").write_text(json.dumps(result))
        return list(result["rows"])

    whole = rows("eager:fp32,emulated:fp16")
    assert len(list(tmp_path.glob("*.npz"))) == len(whole) == 4
    with monkeypatch.context() as patch:
        patch.setattr("bench.quality.variants.engine_generator", lambda *_: no_images)
        assert rows("eager:fp32,emulated:fp16") == whole
        with pytest.raises(AssertionError, match="made again"):
            rows("eager:fp32,eager:bf16")
        line[line.index("6")] = "12"
        with pytest.raises(AssertionError, match="made again"):
            rows("eager:fp32")
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "quality.md").read_text()
    assert "Nothing was timed" in page
    assert "times the first's" not in page


def test_other_variants_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--variants", "eager"])
    assert "needed is <backend>:<precision>" in capsys.readouterr().err
    assert main(["--model", str(folder), "--variants", "diffusers:int3"]) == 3
    assert "diffusers runs in fp32" in capsys.readouterr().err
    assert main(["--model", str(folder), "--variants", "emulated:fp4"]) == 3
    assert "by rounding there are fp8, fp16" in capsys.readouterr().err
