"""bench.quality.geneval reads GenEval's results as its summary_scores.py does."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality.geneval import main
from bench.quality.images.folder import ImageFolder

RIGHT = {"single_object": [(1, 1, 1, 1), (1, 0, 1, 1)], "counting": [(0, 0, 0, 1)]}  # tag -> prompts -> images


def results(path: Path, right: dict[str, list[tuple[int, ...]]] = RIGHT) -> Path:
    lines = [
        {"filename": "x", "tag": tag, "prompt": "p", "correct": bool(correct), "metadata": json.dumps([tag, number])}
        for tag, prompts in right.items()
        for number, images in enumerate(prompts)
        for correct in images
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict[str, Any]]:
    code = main(list(line))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_overall_is_the_mean_of_the_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, str(results(tmp_path / "results.jsonl")))
    assert (code, result["images"], result["prompts"]) == (0, 12, 3)
    assert result["tags"] == {"single_object": 0.875, "counting": 0.25}
    assert result["overall"] == 0.5625
    assert result["interval"][0] <= 0.5625 <= result["interval"][1]


def test_images_that_nobody_judged_are_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ImageFolder(tmp_path / "images").locked({"files": 16}):
        pass
    code, result = run(capsys, str(results(tmp_path / "r.jsonl")), "--images", str(tmp_path / "images"))
    assert (code, result["missing"]) == (1, 4)


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_other_files_are_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    assert main([str(tmp_path / "r.jsonl")]) == 3
    assert "r.jsonl" in capsys.readouterr().err
