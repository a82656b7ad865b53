"""Built engines of other decoders: they hold the decoder of the build, and a start with another one is refused."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_checkpoint import SMALL_LITE, SMALL_TAESANA, save_decoder

from engines.artifacts.manifest import Manifest
from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.errors import ArtifactError
from engines.loader import load_engine
from engines.models.dcae import AutoencoderConfig
from engines.models.taesana import TaesanaConfig
from engines.types import Engine, Job, Pixels

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

JOB = Job("a red circle", seed=3, width=64, height=64)
LITE = pytest.param(SMALL_LITE, id="lite", marks=pytest.mark.slow)  # an autoencoder of the full one's kind
TAESANA = pytest.param(SMALL_TAESANA, id="taesana")
DECODERS = pytest.mark.parametrize("kind", [TAESANA, LITE], indirect=True)


def spec(model: Path, out: Path, decoder: Path, **more: str) -> BuildSpec:
    asked = BuildSpec(str(model), "cpu", "fp32", out, batches=(1,), steps=(1,), decoder=str(decoder))
    return replace(asked, **more)


@dataclass(frozen=True)
class Built:
    """An engine folder, and the folder of the other decoder in it."""

    manifest: Manifest
    out: Path
    decoder: Path


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> TaesanaConfig | AutoencoderConfig:
    """The architecture of the other decoder."""
    config: TaesanaConfig | AutoencoderConfig = request.param
    return config


@pytest.fixture(scope="module")
def with_one(
    kind: TaesanaConfig | AutoencoderConfig, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """Holds the other decoder in place of its own."""
    folder = tmp_path_factory.mktemp("one")
    decoder = save_decoder(folder / "other", kind)
    return Built(build(spec(small_checkpoint, folder / "out", decoder)).manifest, folder / "out", decoder)


@pytest.fixture(scope="module")
def with_two(
    kind: TaesanaConfig | AutoencoderConfig, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """Holds its own decoder and the other one."""
    folder = tmp_path_factory.mktemp("two")
    decoder = save_decoder(folder / "fast", kind)
    asked = both(small_checkpoint, folder / "out", decoder)
    return Built(build(asked).manifest, folder / "out", decoder)


def both(model: Path, out: Path, fast: Path) -> BuildSpec:
    return replace(spec(model, out, fast), decoder=None, fast_decoder=str(fast))


def levels(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@DECODERS
def test_an_engine_holds_its_decoder_and_is_started_with_it(small_checkpoint: Path, with_one: Built) -> None:
    model, decoder, manifest, out = str(small_checkpoint), with_one.decoder, with_one.manifest, str(with_one.out)
    assert (manifest.decoder, f"--decoder {decoder}" in manifest.command) == (str(decoder), True)
    built = load_engine(model, engine_dir=out, decoder=str(decoder))
    [found] = built.generate([JOB])
    [expected] = load_engine(model, precision="fp32", decoder=str(decoder)).generate([JOB])
    assert levels(found.pixels, expected.pixels) <= 2
    [full] = load_engine(model, precision="fp32").generate([JOB])
    assert levels(found.pixels, full.pixels) > 20
    assert built.info.decoders == {"full": str(decoder)}
    with pytest.raises(ArtifactError, match=rf"built with the decoder {decoder}, and started with full .*--decoder"):
        load_engine(model, engine_dir=out)


def decoded(engine: Engine) -> list[Pixels]:
    """Returns the images of JOB by each decoder."""
    engine.warmup()
    return [engine.generate([job])[0].pixels for job in (JOB, replace(JOB, decoder="fast"))]


@pytest.mark.parametrize("kind", [TAESANA], indirect=True)
def test_beside_a_built_engine_the_second_decoder_runs_in_pytorch(
    small_checkpoint: Path, with_one: Built, tmp_path: Path
) -> None:
    model, full, fast = str(small_checkpoint), str(with_one.decoder), str(save_decoder(tmp_path / "fast", SMALL_LITE))
    engine = load_engine(model, engine_dir=str(with_one.out), decoder=full, fast_decoder=fast)
    for found, decoder in zip(decoded(engine), (full, fast), strict=True):
        [expected] = load_engine(model, precision="fp32", decoder=decoder).generate([JOB])
        assert levels(found, expected.pixels) <= 2
    why = engine.info.reasons["fast_decoder"]
    assert why.startswith("PyTorch: the built engines hold one decoder; for both: python build_engine.py --model")
    assert why.endswith(f" --fast-decoder {fast}")
    assert engine.info.decoders == {"full": full, "fast": fast}


@DECODERS
def test_an_engine_holds_both_decoders(small_checkpoint: Path, with_two: Built) -> None:
    model, out, fast, manifest = str(small_checkpoint), with_two.out, with_two.decoder, with_two.manifest
    assert (manifest.decoder, manifest.fast_decoder) == (None, str(fast))
    assert manifest.command.endswith(f" --fast-decoder {fast}")
    assert [made.module for made in manifest.artifacts] == ["transformer", "decoder", "encoder", "fast_decoder"]
    assert manifest.artifacts[-1].parity["gate"] == "levels of 255 <= 1"
    engine = load_engine(model, engine_dir=str(out), fast_decoder=str(fast))
    for found, decoder in zip(decoded(engine), (None, str(fast)), strict=True):
        [expected] = load_engine(model, precision="fp32", decoder=decoder).generate([JOB])
        assert levels(found, expected.pixels) <= 2
    assert "fast_decoder" not in engine.info.reasons
    assert engine.info.decoders == {"full": "full", "fast": str(fast)}
    assert not build(both(small_checkpoint, out, fast)).changed


@pytest.mark.parametrize("kind", [TAESANA], indirect=True)
def test_engines_of_two_decoders_start_with_the_same_two_or_the_first_alone(
    small_checkpoint: Path, with_two: Built, tmp_path: Path
) -> None:
    model, out = str(small_checkpoint), Path(shutil.copytree(with_two.out, tmp_path / "out"))
    fast, lite = with_two.decoder, save_decoder(tmp_path / "lite", SMALL_LITE)
    (tmp_path / "moved").symlink_to(fast)
    moved = load_engine(model, engine_dir=str(out), fast_decoder=str(tmp_path / "moved"))
    assert len(decoded(moved)) == 2  # the same weights under another name
    alone = load_engine(model, engine_dir=str(out))
    assert alone.limits.decoders == ("full",)
    with pytest.raises(ArtifactError, match=rf"built with the fast decoder {fast}, and started with {lite} \(--fast-d"):
        load_engine(model, engine_dir=str(out), fast_decoder=str(lite))
    with pytest.raises(ArtifactError, match=rf"built with the decoder full, and started with {lite} \(--decoder\)"):
        load_engine(model, engine_dir=str(out), decoder=str(lite), fast_decoder=str(fast))
    weights = fast / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    try:
        save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
        with pytest.raises(ArtifactError, match=rf"fast decoder {fast} of weights \w+, and {fast} has \w+; build it"):
            load_engine(model, engine_dir=str(out), fast_decoder=str(fast))
    finally:
        weights.write_bytes(content)
    (out / "fast_decoder-64x64.bin").unlink()
    with pytest.raises(ArtifactError, match=r"fast_decoder-64x64\.bin is missing"):
        load_engine(model, engine_dir=str(out))


@pytest.mark.slow  # exports and compiles four modules of the shipped checkpoint
def test_openvino_builds_the_shipped_checkpoint_with_its_taesana(tmp_path: Path) -> None:
    asked = BuildSpec("tiny", "cpu", "fp32", tmp_path, batches=(1, 2), steps=(1,), fast_decoder="taesana")
    manifest = build(replace(asked, out=tmp_path / "out")).manifest
    assert manifest.command.endswith("--fast-decoder taesana")
    engine = load_engine("tiny", engine_dir=str(tmp_path / "out"), fast_decoder="taesana", max_batch=2)
    reference = load_engine("tiny", precision="fp32", fast_decoder="taesana", max_batch=2)
    jobs = [replace(JOB, width=256, height=256, decoder=name) for name in ("full", "fast")]
    images = zip(engine.generate(jobs), reference.generate(jobs), strict=True)
    assert [levels(found.pixels, expected.pixels) <= 2 for found, expected in images] == [True, True]
    full, fast = (image.pixels for image in reference.generate(jobs))
    assert levels(full, fast) > 2


@DECODERS
@pytest.mark.slow  # TensorRT compiles three modules
def test_tensorrt_for_rtx_builds_it_ahead_of_time_for_an_rtx_4090(
    kind: TaesanaConfig | AutoencoderConfig, small_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed: nothing is compiled here")
    decoder = save_decoder(tmp_path / "other", kind)
    more = {"gpu": "rtx4090", "precision": "fp16", "vendor": "tensorrt"}
    manifest: Manifest = build(spec(small_checkpoint, tmp_path / "out", decoder, **more)).manifest
    assert (manifest.compute_capability, manifest.decoder) == ("8.9", str(decoder))
    [compiled] = [made for made in manifest.artifacts if made.module == "decoder"]
    assert compiled.files[0].bytes > 1e4
    assert compiled.parity["of"] == "graph"
