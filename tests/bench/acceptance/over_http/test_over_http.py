"""bench.acceptance.over_http measures our server over HTTP on a CPU, each figure once."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance.over_http.__main__ import main
from bench.acceptance.over_http.client import fresh_prompts
from bench.acceptance.over_http.figures import Figures
from bench.harness import host
from engines.checkpoints.checkpoint import open_checkpoint
from engines.models.instruction import INSTRUCTION
from engines.pipeline.prompt_tokenizer import PromptTokenizer

ABOUT = {"model": "m", "precision": "fp32", "device": "cpu"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_figure_once(tmp_path: Path) -> None:
    command = ["--device", "cpu", "--quick", "--models", "tiny", "--peers", "", "--out", str(tmp_path)]
    assert main(command) == 0
    [path] = tmp_path.iterdir()
    results = {line["name"]: line for line in lines(path)}
    alone = {f"{kind} alone" for kind in ("jpeg", "png", "webp", "2 steps", "4 steps", "controlnet")}
    assert set(results) == alone | {
        "projected", "ready", "first request", "live", "closed loop 1", "closed loop 2", "8 at once", "memory",
    }  # fmt: skip
    assert not any("error" in line for line in results.values())
    assert results["png alone"]["ms"]["count"] == 3
    assert set(results["png alone"]["stages"]) == {"queue", "text", "denoise", "decode", "encode", "total"}
    assert results["closed loop 2"]["per_second"] > 0
    assert results["ready"]["start_s"]["first images"] <= results["ready"]["seconds"]
    assert "backend" in results["ready"]["reasons"]
    assert results["8 at once"]["mean_ms"] > 0
    assert results["projected"]["projected_ms"]["H100"]["total"] > 0
    before = path.read_text()
    assert main(command) == 0, "nothing is left to do"
    assert path.read_text() == before


def test_figures_that_are_asked_for_alone(tmp_path: Path) -> None:
    command = ["--device", "cpu", "--quick", "--models", "tiny", "--peers", "", "--out", str(tmp_path)]
    assert main([*command, "--figures", "ready,8 at once"]) == 0
    [path] = tmp_path.iterdir()
    assert [line["name"] for line in lines(path)] == ["ready", "8 at once"]


def test_packed_code_tells_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "bench" / "harness" / "host.py"
    monkeypatch.setattr(host, "__file__", str(module))
    (tmp_path / host.REVISION).write_text("abc123\n")
    assert host.host_facts()["revision"] == "abc123"


@pytest.mark.gpu
def test_on_a_card_its_name_and_precisions_are_told(tmp_path: Path) -> None:
    assert main(["--quick", "--models", "tiny", "--precisions", "bf16", "--peers", "", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    assert "cpu" not in path.name
    assert {line["about"]["precision"] for line in lines(path)} == {"bf16"}


def test_a_failure_is_tried_again_and_time_ends(tmp_path: Path) -> None:
    now = [0.0]

    def opened() -> Figures:
        return Figures(tmp_path / "f.jsonl", 10, lambda: now[0])

    def broken() -> dict[str, Any]:
        raise ValueError("no card")

    figures = opened()
    figures.take(ABOUT, "a", broken)
    assert figures.left_out == 1
    again = opened()
    again.take(ABOUT, "a", lambda: {"ms": 1})
    again.take(ABOUT, "a", broken)
    now[0] = 11
    again.take(ABOUT, "b", lambda: {"ms": 2})
    assert again.left_out == 1
    assert [line.get("error", line.get("ms")) for line in lines(tmp_path / "f.jsonl")] == ["ValueError: no card", 1]
    assert opened().has(ABOUT, "a")
    assert not opened().has({**ABOUT, "precision": "fp8"}, "a")


@pytest.mark.parametrize("tokens", [5, 20])
def test_prompts_have_their_tokens(tokens: int) -> None:
    checkpoint = open_checkpoint("tiny")
    instruction = INSTRUCTION if checkpoint.settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, checkpoint.settings.max_prompt_tokens)
    prompts = fresh_prompts(checkpoint, tokens)
    made = [next(prompts) for _ in range(12)]
    assert len(set(made)) == 12
    assert {len(tokenizer.encode(prompt).tokens.ids) - len(tokenizer.prefix) for prompt in made} == {tokens}
