"""distill.ablation: rows by seed, written once, resumed, shared by processes, and reported with intervals."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import ablation
from distill.evaluation.ablation_section import BOTH, PARTS
from distill.recipes import RECIPES
from distill.stages import student
from distill.stages.recovered_teacher import recover
from engines.checkpoints.checkpoint import open_checkpoint

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "tiny")


class Folder:
    """The run folder, and the command on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def run(self, *more: str, updates: int = 1) -> dict[str, Any]:
        line = ["--recipe", "smoke", "--run", str(self.folder), "--model", MODEL, "--recovery", "2", "--float32"]
        small = ["--seeds", "2", "--updates", str(updates), "--prompts", "3"]
        assert ablation.main([*line, *small, *more]) == 0
        result: dict[str, Any] = json.loads(self.capsys.readouterr().out.splitlines()[-1])
        return result

    def rows(self) -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in self.folder.glob("ablation/*/row.json")}


def no_training(*_: object) -> None:
    raise AssertionError("a row was trained again")


def test_rows_resume_share_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, page = Folder(tmp_path, capsys), tmp_path / "README.md"
    page.write_text("# Page\n\n## Ablation\n\n## Next\n")
    result = folder.run("--write", str(page))
    assert result["missing"] == []
    assert {name: row["seeds"] for name, row in result["rows"].items() if name in (BOTH, *PARTS)} == {
        BOTH: 2,
        PARTS[0]: 2,
        PARTS[1]: 2,
    }
    assert set(result["apart"]) == set(PARTS)
    assert "| LADD alone | 2 | " in page.read_text()
    assert page.read_text().endswith("## Next\n")
    assert not list(tmp_path.glob("ablation/*/student.pt")), "weights of finished rows take no space"
    first = folder.rows()
    assert len(first) == 2 + 2 * 3

    with monkeypatch.context() as patch:
        patch.setattr(student, "train", no_training)
        assert folder.run()["rows"] == result["rows"]

    again = tmp_path / "ablation" / "scm_ladd-1"
    (again / "row.json").unlink()
    with (again / "claim").open("w") as claim:  # as another process holds it
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert folder.run()["missing"] == [f"{BOTH}, seed 1"]
    (again / "student.jsonl").unlink(missing_ok=True)
    assert folder.run("--report")["missing"] == [f"{BOTH}, seed 1"]
    assert folder.run()["missing"] == []
    assert folder.rows() == first, "the same seed trains the same student"

    line = ["--recipe", "smoke", "--run", str(tmp_path), "--model", MODEL, "--float32", "--updates", "3"]
    assert ablation.main(line) == 2
    assert "take another folder" in capsys.readouterr().err


def test_seeds_decide_the_students_and_parts_what_is_trained() -> None:
    config = RECIPES["tiny"]().distil
    rows = ablation.variants(config, 60)
    assert rows[BOTH].steps == rows[PARTS[1]].steps == 120, "a discriminator's step for each update"
    assert rows[PARTS[0]].steps == 60
    assert rows[PARTS[0]].adversarial_weight == rows[PARTS[1]].scm_weight == 0
    assert rows[BOTH].adversarial_from == 0
    for row in rows.values():
        assert (row.warmup, row.tangent_warmup) == (row.steps // 6, row.steps // 3)


def test_a_recovered_teacher_has_no_guidance_and_is_trained_once(tmp_path: Path) -> None:
    recipe = RECIPES["smoke"]()
    checkpoint = open_checkpoint(MODEL)
    found = [recover(recipe, checkpoint, tmp_path, 2, torch.device("cpu")).teacher.transformer for _ in range(2)]
    first, second = (dict(transformer.named_parameters()) for transformer in found)
    assert not first["time_embed.guidance_embedder.linear_2.weight"].any()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    finished = checkpoint.load_transformer(torch.float32, torch.device("cpu"))
    moved = [name for name, value in finished.named_parameters() if not torch.equal(value, first[name])]
    assert any("transformer_blocks" in name for name in moved)
