"""Images in the evaluators' layout: whole, once, equal after a stop, and of one origin per folder."""

import fcntl
import io
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.harness.errors import BenchError
from bench.quality.images.folder import ImageFolder
from bench.quality.images.layouts import ImageFile
from bench.quality.images.makers import FileResult, SamplingOptions
from bench.quality.images.prompt_sets import Kind, PromptEntry, PromptSet
from bench.quality.images.run import make_images
from engines.fake import expected_pixels
from engines.types import Job

ASKED = SamplingOptions()
SIDE = 64


class Painter:
    """A maker without a model: the fake engine's colours, which differ with the batch mates."""

    def __init__(self, facts: Mapping[str, Any] | None = None, batch: int = 3, fails_after: int | None = None) -> None:
        self.facts, self.batch, self._left = facts or {"checkpoint": "painter"}, batch, fails_after
        self.seen: list[list[str]] = []

    def make(self, files: Sequence[ImageFile]) -> list[FileResult]:
        if self._left is not None:
            if self._left == 0:
                raise BenchError("the painter has left")
            self._left -= 1
        self.seen.append([file.name for file in files])
        mates = sum(map(len, (file.prompt for file in files))) % 200
        return [
            FileResult([self._painted(file.prompt, seed, mates) for seed in file.seeds], len(file.prompt) > 10)
            for file in files
        ]

    def _painted(self, prompt: str, seed: int, mates: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pixels = expected_pixels(Job(prompt, seed, SIDE, SIDE)).copy()
        pixels[0, 0] = mates
        return pixels

    def close(self) -> None: ...


def prompts(kind: Kind = "mjhq", count: int = 10) -> PromptSet:
    texts = [f"prompt {number:03}" for number in range(count)]
    line = {"tag": "colors", "include": [], "prompt": "x"}
    return PromptSet(
        kind, "test", tuple(PromptEntry(f"{at:05}", text, line, "colors") for at, text in enumerate(texts))
    )


def files(folder: Path) -> dict[str, bytes]:
    images = folder / "images"
    return {str(path.relative_to(images)): path.read_bytes() for path in images.rglob("*") if path.is_file()}


def test_mjhq_is_a_folder_of_jpegs_with_seeds_of_their_own(tmp_path: Path) -> None:
    result = make_images(prompts(), [Painter()], ASKED, tmp_path, seed=7)
    assert (result["files"], result["missing"], result["twice"], result["prompts_truncated"]) == (10, 0, 0, 0)
    contents = files(tmp_path)
    assert sorted(contents) == [f"{at:05}.jpg" for at in range(10)]
    image = Image.open(io.BytesIO(contents["00003.jpg"]))
    assert (image.format, image.size, image.mode) == ("JPEG", (SIDE, SIDE), "RGB")
    assert ImageFolder(tmp_path).finished()["00003.jpg"].seeds == (10,)


def test_geneval_has_a_folder_for_each_prompt(tmp_path: Path) -> None:
    make_images(prompts("geneval", 2), [Painter()], ASKED, tmp_path)
    names = [f"{at:05}/samples/{sample:05}.png" for at in range(2) for sample in range(4)]
    assert sorted(files(tmp_path)) == sorted([*names, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert json.loads((tmp_path / "images" / "00001" / "metadata.jsonl").read_text())["tag"] == "colors"
    seeds = [ImageFolder(tmp_path).finished()[name].seeds for name in names]
    assert seeds == [(seed,) for seed in range(8)]


def test_dpg_is_a_square_of_four(tmp_path: Path) -> None:
    make_images(prompts("dpg", 1), [Painter()], ASKED, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "images" / "00000.png"))
    assert pixels.shape == (2 * SIDE, 2 * SIDE, 3)
    for seed, (top, remaining) in enumerate([(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]):
        expected = expected_pixels(Job("prompt 000", seed, SIDE, SIDE))
        assert np.array_equal(pixels[top + 1 : top + SIDE, remaining : remaining + SIDE], expected[1:])


def test_a_stopped_run_ends_with_the_same_files(tmp_path: Path) -> None:
    whole = make_images(prompts(), [Painter()], ASKED, tmp_path / "whole")
    with pytest.raises(BenchError, match="has left"):
        make_images(prompts(), [Painter(fails_after=2)], ASKED, tmp_path / "stopped")
    assert len(ImageFolder(tmp_path / "stopped").finished()) == 6
    (tmp_path / "stopped" / "images" / "00001.jpg").write_bytes(b"damaged")
    with (tmp_path / "stopped" / "images.jsonl").open("a") as journal:
        journal.write('{"name": "00006.j')  # left by a killed run
    again = Painter()
    result = make_images(prompts(), [again], ASKED, tmp_path / "stopped")
    assert (result["made_now"], result["missing"], result["twice"]) == (5, 0, 0)
    assert result["digest"] == whole["digest"]
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert again.seen == [[f"{at:05}.jpg" for at in group] for group in ([0, 1, 2], [6, 7, 8], [9])]
    assert make_images(prompts(), [Painter()], ASKED, tmp_path / "stopped")["made_now"] == 0


def test_two_workers_make_each_image_once(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=30)

    class Sociable(Painter):
        def make(self, files: Sequence[ImageFile]) -> list[FileResult]:
            if not self.seen:
                meeting.wait()
            return super().make(files)

    workers = [Sociable(), Sociable()]
    result = make_images(prompts(count=60), workers, ASKED, tmp_path)
    assert (result["files"], result["missing"], result["twice"]) == (60, 0, 0)
    names = [name for worker in workers for group in worker.seen for name in group]
    assert len(names) == len(set(names)) == 60
    assert all(worker.seen for worker in workers)


def test_a_folder_keeps_to_what_made_it(tmp_path: Path) -> None:
    make_images(prompts(), [Painter({"precision": "fp32"})], ASKED, tmp_path)
    for other, sampling, message in [
        ({"precision": "bf16"}, ASKED, "made_by was .*fp32.*, is now .*bf16"),
        ({"precision": "fp32"}, SamplingOptions(steps=2), "steps was 1, is now 2"),
    ]:
        with pytest.raises(BenchError, match=message):
            make_images(prompts(), [Painter(other)], sampling, tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BenchError, match="another process"):
            make_images(prompts(), [Painter({"precision": "fp32"})], ASKED, tmp_path)


def test_other_numbers_are_refused(tmp_path: Path) -> None:
    for options, kind, message in [
        ({"samples": 3}, "dpg", "a square"),
        ({"seed": 2**63 - 4}, "mjhq", "allowed is 0 to"),
    ]:
        with pytest.raises(BenchError, match=message):
            make_images(prompts(kind), [Painter()], ASKED, tmp_path, **options)  # type: ignore[arg-type]
