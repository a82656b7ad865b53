"""Metrics with small stand-ins for the networks: arithmetic, folders, missing weights.

test_reference.py compares with the networks of the published figures, in a separate environment (make quality-proof).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.harness.errors import BenchError
from bench.quality.images.folder import ImageFolder, JournalEntry
from bench.quality.metrics.__main__ import main
from bench.quality.metrics.distances import Moments, frechet_distance, mean_discrepancy
from bench.quality.metrics.image_items import as_tensor, center_crop, read_images
from bench.quality.metrics.measures import clip_score, cmmd, fid
from bench.quality.metrics.weights import Published, UnavailableError, WeightLocations
from distill.evaluation.scores import evaluation_prompts
from distill.world.rendering import render, sample_scene
from distill.world.scenes import World

SIDE = 64


class Projection:
    """A stand-in for CLIP and for Inception: seeded random features of the image, and of the letters of a text."""

    logit_scale = 100.0

    def __init__(self, features: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        self._matrix = torch.randn(3 * 8 * 8, features, generator=generator)

    def prepare(self, image: Image.Image) -> Tensor:
        return as_tensor(image.resize((8, 8)))

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(batch, 8).flatten(1) @ self._matrix

    def images(self, batch: Tensor) -> Tensor:
        return torch.nn.functional.normalize(batch.flatten(1) @ self._matrix, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.tensor([float(text.count(letter)) for letter in "abcdefghijklmnop"]) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def folder_of(root: Path, count: int, seed: int = 0, files: int | None = None) -> Path:
    """Rendered scenes with their captions, as bench.quality.images leaves them."""
    folder = ImageFolder(root)
    rng = np.random.default_rng(seed)
    with folder.locked({"files": files or count}):
        for at, prompt in enumerate(evaluation_prompts(count)):
            scene = sample_scene(World(), rng, prompt.category, "held_out")  # of its category, and another's caption
            pixels = render(World(), scene, 128)
            path = folder.images / "part.png"
            Image.fromarray(pixels).save(path)
            content = path.read_bytes()
            path.unlink()

            entry = JournalEntry(
                f"{at:05}.png", prompt.text, (at,), prompt.category, hashlib.sha256(content).hexdigest(), False
            )
            folder.add(entry, content)
    return root


def test_frechet_distance_is_that_of_the_matrix_root() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(80, 12)), rng.normal(0.3, 2, size=(90, 12)) @ rng.normal(size=(12, 12))
    a, b = Moments.of(first), Moments.of(second)
    distance = np.square(a.mean - b.mean).sum()
    shared = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()  # the trace of the product's root
    expected = distance + np.trace(a.covariance + b.covariance) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_dimensions_are_no_trouble() -> None:
    """Equal to the nuclear norm of the product of the centred features, which needs no root of a singular matrix."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(10, 64)), rng.normal(size=(12, 64)) + 0.5
    centred = [(set_ - set_.mean(0)) / np.sqrt(len(set_) - 1) for set_ in (first, second)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    distance = np.square(first.mean(0) - second.mean(0)).sum()
    expected = distance + sum(np.square(set_).sum() for set_ in centred) - 2 * shared
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-6)


def test_mean_discrepancy_is_the_paper_s(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(n, 5)) for n in (7, 9))
    first, second = (set_ / np.linalg.norm(set_, axis=1, keepdims=True) for set_ in (first, second))

    def kernel(x: Any, y: Any) -> float:
        return float(np.mean([[np.exp(-np.square(a - b).sum() / 200) for b in y] for a in x]))

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    monkeypatch.setattr("bench.quality.metrics.distances.ROWS", 4)
    assert mean_discrepancy(first, second) == pytest.approx(expected, rel=1e-9)


def test_measures_of_folders(tmp_path: Path) -> None:
    network = Projection()
    first, second = (folder_of(tmp_path / name, 24, seed) for name, seed in (("one", 0), ("other", 5)))
    items = read_images(first)
    distance = fid(items, second, network, SIDE, tmp_path / "kept.npz")
    assert distance > fid(items, first, network, SIDE) == pytest.approx(0, abs=1e-6)
    assert fid(items, tmp_path / "kept.npz", network, SIDE) == distance
    with pytest.raises(BenchError, match="16 features, the network gives 5"):
        fid(items, tmp_path / "kept.npz", Projection(5), SIDE)
    with pytest.raises(BenchError, match="mu and sigma"):
        fid(items, tmp_path / "none.npz", network, SIDE)
    scores = [
        float(100 * (network.images(network.prepare(Image.open(s.path))[None]) @ network.texts([s.prompt or ""]).T))
        for s in items
    ]
    result = clip_score(items, network)
    assert result.mean == pytest.approx(np.mean(scores), abs=1e-4)
    assert result.low < result.mean < result.high
    assert cmmd(items, second, network) > cmmd(items, first, network) == pytest.approx(0, abs=1e-9)
    with pytest.raises(BenchError, match="prompt of every image"):
        clip_score(read_images(first / "images"), network)


def test_cut_is_torchvision_s() -> None:
    """Sizes and offsets of Resize and CenterCrop: the shorter side exactly, the longer cut down, the middle kept."""
    pixels = np.zeros((30, 101, 3), np.uint8)
    pixels[:, 50] = 255
    cut = center_crop(10)(Image.fromarray(pixels))
    assert cut.shape == (3, 10, 10)
    assert int(cut[0, 5].argmax()) in (4, 5)
    assert center_crop(10)(Image.fromarray(pixels.transpose(1, 0, 2))).shape == (3, 10, 10)


def test_the_judge_and_an_absent_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = folder_of(tmp_path / "one", 12)
    (tmp_path / "weights").mkdir()
    line = [str(first), "--metrics", "judge,fid", "--weights", str(tmp_path / "weights"), "--reference", str(first)]
    assert main(line) == 1
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result["metrics"]["judge"]["categories"]) <= {first.tag for first in read_images(first)}
    assert 0 <= result["metrics"]["judge"]["value"] < 1
    assert "pt_inception-2015-12-05-6726825d.pth is not in" in result["metrics"]["fid"]["unavailable"]
    assert "--download fetches it" in out
    assert main([str(first), "--metrics", "judge"]) == 0


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="3 of 5 images"):
        read_images(folder_of(tmp_path / "part", 3, files=5))
    with pytest.raises(BenchError, match="holds no images"):
        read_images(tmp_path / "none")


def test_weights_are_named_and_checksummed(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "a.pt").write_bytes(b"weights")
    sha256 = "9a3f1af1fc2a3ed6d9d2a8d4b2cbf1d8f1fb3f4c"
    locations = WeightLocations(tmp_path)
    result = locations.find("clip", Published("a.pt", hub="org/repository"))
    assert result.published is None
    assert locations.find("clip", Published("a.pt", hub="org/repository", sha256=result.sha256[:8])).published
    assert locations.find("clip", Published("a.pt", hub="org/repository", sha256=sha256)).published is False
    with pytest.raises(UnavailableError, match=r"b\.pt is not in .*https://huggingface\.co/org/repository"):
        locations.find("clip", Published("b.pt", hub="org/repository"))
