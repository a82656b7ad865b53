"""Built engines of other decoders: they hold the decoder of the build, and a start with another one is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_checkpoint import SMALL_LITE, SMALL_TAESANA, save_decoder

from engines.artifacts.manifest import Manifest
from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.errors import ArtifactError
from engines.loader import load_engine
from engines.models.dcae import AutoencoderConfig
from engines.models.taesana import TaesanaConfig
from engines.types import Job, Pixels

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

JOB = Job("a red circle", seed=3, width=64, height=64)
DECODERS = pytest.mark.parametrize("config", [SMALL_TAESANA, SMALL_LITE], ids=["taesana", "lite"])


def spec(model: Path, out: Path, decoder: Path, **more: str) -> BuildSpec:
    asked = BuildSpec(str(model), "cpu", "fp32", out, batches=(1,), steps=(1,), decoder=str(decoder))
    return replace(asked, **more)


def levels(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@DECODERS
def test_an_engine_holds_its_decoder_and_is_started_with_it(
    config: TaesanaConfig | AutoencoderConfig, small_checkpoint: Path, tmp_path: Path
) -> None:
    model, decoder = str(small_checkpoint), save_decoder(tmp_path / "other", config)
    manifest = build(spec(small_checkpoint, tmp_path / "out", decoder)).manifest
    assert (manifest.decoder, f"--decoder {decoder}" in manifest.command) == (str(decoder), True)
    built = load_engine(model, engine_dir=str(tmp_path / "out"), decoder=str(decoder))
    [found] = built.generate([JOB])
    [expected] = load_engine(model, precision="fp32", decoder=str(decoder)).generate([JOB])
    assert levels(found.pixels, expected.pixels) <= 2
    [full] = load_engine(model, precision="fp32").generate([JOB])
    assert levels(found.pixels, full.pixels) > 20
    assert built.info.decoders == {"full": str(decoder)}
    with pytest.raises(ArtifactError, match=rf"built with the decoder {decoder}, and started with full .*--decoder"):
        load_engine(model, engine_dir=str(tmp_path / "out"))


def test_beside_a_built_engine_the_second_decoder_runs_in_pytorch(small_checkpoint: Path, tmp_path: Path) -> None:
    model, fast = str(small_checkpoint), str(save_decoder(tmp_path / "fast", SMALL_TAESANA))
    build(replace(spec(small_checkpoint, tmp_path / "out", tmp_path), decoder=None))
    engine = load_engine(model, engine_dir=str(tmp_path / "out"), fast_decoder=fast)
    engine.warmup()
    jobs = [JOB, replace(JOB, decoder="fast")]
    for job, decoder in zip(jobs, (None, fast), strict=True):
        [found] = engine.generate([job])
        [expected] = load_engine(model, precision="fp32", decoder=decoder).generate([JOB])
        assert levels(found.pixels, expected.pixels) <= 2
    assert engine.info.reasons["fast_decoder"] == "PyTorch: built engines hold one decoder"
    assert engine.info.decoders == {"full": "full", "fast": fast}


@DECODERS
@pytest.mark.slow  # TensorRT compiles three modules
def test_tensorrt_for_rtx_builds_it_ahead_of_time_for_an_rtx_4090(
    config: TaesanaConfig | AutoencoderConfig, small_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed: nothing is compiled here")
    decoder = save_decoder(tmp_path / "other", config)
    more = {"gpu": "rtx4090", "precision": "fp16", "vendor": "tensorrt"}
    manifest: Manifest = build(spec(small_checkpoint, tmp_path / "out", decoder, **more)).manifest
    assert (manifest.compute_capability, manifest.decoder) == ("8.9", str(decoder))
    [compiled] = [made for made in manifest.artifacts if made.module == "decoder"]
    assert compiled.files[0].bytes > 1e4
    assert compiled.parity["of"] == "graph"
