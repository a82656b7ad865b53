"""Adapters in built engines: fused, in the fingerprint, and required again at start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoint import EVERYWHERE, random_factors, save_lora

import build_engine
from engines.artifacts.manifest import read_manifest
from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import ArtifactError, BackendError
from engines.loader import load_engine
from engines.types import AdapterOption, Job

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")


def test_an_engine_holds_its_adapters_and_is_started_with_the_same(small_checkpoint: Path, tmp_path: Path) -> None:
    like = open_checkpoint(str(small_checkpoint)).load_transformer(torch.float32, torch.device("cpu"))
    path = save_lora(tmp_path / "one.safetensors", random_factors(like, EVERYWHERE, 3, 1))
    given, out = AdapterOption("one", str(path), 0.5), tmp_path / "out"
    spec = BuildSpec(str(small_checkpoint), "cpu", "fp32", out, batches=(1,), steps=(1,), lora=(given,))
    plain = BuildSpec(str(small_checkpoint), "cpu", "fp32", tmp_path / "plain", batches=(1,), steps=(1,))
    assert build(spec).changed
    assert not build(spec).changed
    manifest = read_manifest(out)
    assert manifest.adapters == (("one", 0.5),)
    assert f"--lora {given}" in manifest.command
    assert build_engine.parse(manifest.command.split()[2:]).lora == (given,)
    assert manifest.fingerprint != build(plain).manifest.fingerprint

    job = Job("a red circle", seed=3, width=64, height=64)
    [found] = load_engine(str(small_checkpoint), engine_dir=str(out), lora=[given]).generate([job])
    [expected] = load_engine(str(small_checkpoint), precision="fp32", lora=[given]).generate([job])
    assert int(np.abs(found.pixels.astype(int) - expected.pixels.astype(int)).max()) <= 1

    with pytest.raises(ArtifactError, match=r"built with the adapters one:0.5, and started with none.*--lora one="):
        load_engine(str(small_checkpoint), engine_dir=str(out))
    with pytest.raises(ArtifactError, match=r"built with the adapters one:0.5, and started with one:1"):
        load_engine(str(small_checkpoint), engine_dir=str(out), lora=[given._replace(scale=1.0)])
    free = given._replace(scale=None)
    with pytest.raises(BackendError, match=rf"lora one: built engines hold adapters fused.*--lora {free}:1"):
        load_engine(str(small_checkpoint), engine_dir=str(out), lora=[free])
