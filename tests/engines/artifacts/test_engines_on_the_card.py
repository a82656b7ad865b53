"""Built engines on a GPU: built for it, run and captured there (make accept-gpu)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.artifacts.manifest import read_manifest
from engines.backends.parity import IMAGE_GATES, difference
from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.device.hardware import capability_text, this_machine
from engines.loader import load_engine
from engines.pipeline.engine import SprintEngine
from engines.types import Engine, Job, RawImage

pytestmark = pytest.mark.gpu

MODEL, SIDE = "tiny", 256


def jobs(count: int, steps: int) -> list[Job]:
    return [Job("a red circle", seed, SIDE, SIDE, steps, 4 + seed / 4) for seed in range(count)]


def stacked(images: list[RawImage]) -> torch.Tensor:
    return torch.stack([torch.tensor(image.pixels) for image in images])


@pytest.fixture(scope="module", params=["fp16", "bf16", "fp8"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="the extra 'build' is not installed")
    out = tmp_path_factory.mktemp("card") / request.param
    build(BuildSpec(MODEL, "native", request.param, out, batches=(1, 2), steps=(1, 2)))
    return out


@pytest.fixture(scope="module")
def served(engines: Path) -> Engine:
    engine = load_engine(MODEL, engine_dir=str(engines))
    engine.warmup()
    return engine


def test_the_manifest_names_the_card_and_what_its_layers_compute_in(engines: Path) -> None:
    manifest, here = read_manifest(engines), this_machine()
    assert manifest.executed
    assert (manifest.device, manifest.compute_capability) == (here.gpu, capability_text(here.capability))
    [transformer] = [artifact for artifact in manifest.artifacts if artifact.module == "transformer"]
    layers = transformer.details["layers_by_precision"]
    assert {"fp16": "FP16", "bf16": "BF16", "fp8": "FP8"}[manifest.precision] in layers
    assert all(artifact.parity["of"] == "engine" for artifact in manifest.artifacts)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_images_keep_the_gate_out_of_captured_graphs(count: int, steps: int, served: Engine) -> None:
    assert isinstance(served, SprintEngine)
    assert served._runners is not None
    assert served._runners.plain.ready
    found = served.generate(jobs(count, steps))
    assert not found[0].uncaptured
    assert min(found[0].stages.denoise, found[0].stages.decode) > 0
    assert torch.equal(stacked(found), stacked(served.generate(jobs(count, steps)))), "not the same twice"
    eager = load_engine(MODEL, backend="eager", precision="fp32")
    gate = IMAGE_GATES[served.info.precision]
    if steps == 1:  # later steps amplify the allowed error of the first
        gate.check("image", difference(stacked(eager.generate(jobs(count, steps))), stacked(found)))


def test_an_unseen_number_of_steps_runs_as_it_is(served: Engine) -> None:
    assert served.generate(jobs(1, 3))[0].uncaptured


def test_an_image_is_encoded_by_an_engine(served: Engine) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one, other = (
        served.generate([Job("x", 1, SIDE, SIDE, image=image, strength=0.3)])[0].pixels
        for image in (photo, 255 - photo)
    )
    assert abs(one.astype(int) - other).max() > 10
