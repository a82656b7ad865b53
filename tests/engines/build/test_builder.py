"""Engines for the CPU built, served and refused, and builds that are killed or run out of disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fake_tensorrt
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import build_engine
from engines.artifacts.loading import open_artifact
from engines.artifacts.manifest import MANIFEST_FILE, Artifact, FileRecord, read_manifest
from engines.artifacts.reference import Reference
from engines.backends.cuda.graphs import EagerReplay
from engines.backends.openvino import OpenVinoGraph, has_bf16
from engines.backends.parity import Difference, difference
from engines.backends.tensorrt.runtime import Scratch
from engines.build import builder as building
from engines.build import spec as building_spec
from engines.build.builder import _Build, build, no_progress
from engines.build.spec import BuildSpec, fingerprint_of
from engines.build.targets import Target, resolve
from engines.checkpoints.checkpoint import open_checkpoint
from engines.device.hardware import Machine
from engines.errors import ArtifactError, BackendError, BuildError, CheckpointError, ParityError, SprintError
from engines.loader import load_engine
from engines.pipeline.engine import SprintEngine
from engines.types import Job
from server.loading.build_process import DISK_FULL

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

ROOT = Path(__file__).resolve().parents[3]
needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")


def spec(model: Path, out: Path, precision: str = "fp32") -> BuildSpec:
    return BuildSpec(str(model), "cpu", precision, out, batches=(1, 2), steps=(1, 2))


@pytest.fixture(scope="module", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reuses the export of equal modules, because each takes seconds."""
    kept, export = tmp_path_factory.mktemp("exported"), building.export_onnx

    def export_or_copy(module: nn.Module, name: str, inputs: dict[str, Tensor], path: Path) -> None:
        weights = sum(float(value.double().square().sum()) for value in module.state_dict().values())
        known = kept / f"{name}-{weights!r}.onnx"
        if not known.exists():
            export(module, name, inputs, known)
        shutil.copy(known, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "export_onnx", export_or_copy)
        yield


@pytest.fixture(scope="module")
def engines(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds engines that are read-only: a test that changes them copies them first."""
    out = tmp_path_factory.mktemp("built") / "engines"
    assert build(spec(small_checkpoint, out)).changed
    return out


@pytest.fixture
def copy(engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines, tmp_path / "engines"))


def jobs(count: int, steps: int = 2) -> list[Job]:
    return [Job(f"{word} circle", seed=seed, width=64, height=64, steps=steps) for seed, word in
            enumerate(("a red", "a blue and green", "one")[:count])]  # fmt: skip


def levels(one: NDArray, other: NDArray) -> NDArray:
    return abs(one.astype(int) - other.astype(int))


def test_images_of_built_engines_equal_eager(engines: Path, small_checkpoint: Path) -> None:
    built, eager = load_engine(str(small_checkpoint), engine_dir=str(engines)), load_engine(str(small_checkpoint))
    built.warmup()
    for count in (1, 2):
        for ours, theirs in zip(built.generate(jobs(count)), eager.generate(jobs(count)), strict=True):
            assert levels(ours.pixels, theirs.pixels).max() <= 2
            assert ours.bucket == count
    photo = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    [job] = jobs(1)
    changed = [engine.generate([replace(job, image=photo)])[0].pixels for engine in (built, eager)]
    assert levels(*changed).max() <= 2


def test_built_engines_run_in_captured_graphs(engines: Path, small_checkpoint: Path) -> None:
    """Captures without a device, for the batches and steps of the build."""
    built = load_engine(str(small_checkpoint), engine_dir=str(engines), recorder=EagerReplay())
    assert isinstance(built, SprintEngine)
    built.warmup()
    plain = load_engine(str(small_checkpoint), engine_dir=str(engines))
    for steps in (1, 2, 3):
        for count in (1, 2):
            found = built.generate(jobs(count, steps))
            assert {image.uncaptured for image in found} == {steps == 3}
            for ours, theirs in zip(found, plain.generate(jobs(count, steps)), strict=True):
                assert levels(ours.pixels, theirs.pixels).max() <= 1
                assert not theirs.uncaptured
    assert built.info.reasons["graphs"] == ("4 are captured before the first request: batches 1, 2, 1 size, steps 1, 2")


def test_on_the_card_engines_are_compared_there_and_inspected(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("native", "tensorrt", "tensorrt", (9, 0), executable=True)
    checkpoint = open_checkpoint(str(small_checkpoint))
    work = _Build(spec(small_checkpoint, tmp_path, "fp16"), checkpoint, target, tmp_path, no_progress)
    work.precisions.update({"transformer": "fp16", "decoder": "fp16", "encoder": "fp16"})
    (tmp_path / "module.engine").write_bytes(fake_tensorrt.plan((1, 2)))
    monkeypatch.setattr("engines.backends.tensorrt.vendor.vendor", lambda _: fake_tensorrt)
    record = FileRecord.of(tmp_path / "module.engine")
    work.open(Artifact("decoder", (64, 64), "fp16", (1, 2), 1.0, (record,), {}, {}))
    assert work.layers == {("decoder", (64, 64)): {"layers_by_precision": {"FP16": 4, "FP8": 3, "FP32": 1}}}
    places: list[str] = []

    class Seen:
        def compare(
            self, _: object, dtype: torch.dtype, device: torch.device, *, fast: bool
        ) -> tuple[dict[str, object], Difference]:
            assert not fast
            places.append(f"{device} {dtype}")
            return {}, difference(torch.ones(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8))

    monkeypatch.setattr(Reference, "load", lambda _: Seen())
    for of in ("engine", "graph"):
        work.parity({(64, 64): tmp_path}, lambda *_: None, of)
    assert places == ["cuda torch.float16", "cpu torch.float16"]


@needs_bf16
def test_bf16_engines_stay_near(small_checkpoint: Path, tmp_path: Path) -> None:
    build(spec(small_checkpoint, tmp_path / "bf16", "bf16"))
    built = load_engine(str(small_checkpoint), engine_dir=str(tmp_path / "bf16"), backend="openvino")
    exact = load_engine(str(small_checkpoint))
    for ours, theirs in zip(built.generate(jobs(2, 1)), exact.generate(jobs(2, 1)), strict=True):
        noise = float((levels(ours.pixels, theirs.pixels) ** 2).mean())
        assert 0 < noise <= 255**2 / 10**3.5, "PSNR below 35 dB, or not rounded at all"


def test_the_engine_says_what_it_runs(engines: Path, small_checkpoint: Path) -> None:
    engine = load_engine(str(small_checkpoint), engine_dir=str(engines))
    assert (engine.info.backend, engine.info.precision) == ("openvino", "fp32")
    assert "what" in engine.info.reasons["backend"]
    assert engine.info.manifest is not None
    assert engine.info.manifest["gpu"] == "cpu"
    assert (engine.limits.sizes, engine.limits.max_batch) == (((64, 64),), 2)


def test_the_manifest_names_what_decides(engines: Path, small_checkpoint: Path) -> None:
    manifest = read_manifest(engines)
    assert manifest.checkpoint == str(small_checkpoint)
    assert {artifact.module for artifact in manifest.artifacts} == {"transformer", "decoder", "encoder"}
    assert manifest.versions.keys() >= {"torch", "onnx", "openvino"}
    assert manifest.executed
    assert manifest.seconds > 0
    for parity in [*manifest.pictures.values(), *(artifact.parity for artifact in manifest.artifacts)]:
        assert parity.keys() >= {"max_abs", "mean_abs", "sqnr_db", "gate"}
        assert parity["of"] == "engine"
    assert manifest.pictures["64x64"]["psnr_db"] > 60
    assert json.loads((engines / MANIFEST_FILE).read_text())["sizes"] == [[64, 64]]


def test_an_unchanged_build_does_nothing_and_says_so(
    engines: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "export_onnx", None)
    command = read_manifest(engines).command.split()[2:]
    assert build_engine.main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["precision"] == "fp32"
    assert printed.err.strip() == f"{engines}: nothing has changed, nothing was built"


@pytest.mark.parametrize(
    "change", [{"batches": (1,)}, {"steps": (1,)}, pytest.param({"precision": "bf16"}, marks=needs_bf16)]
)
def test_any_change_builds_again(change: dict[str, object], copy: Path, small_checkpoint: Path) -> None:
    with pytest.raises(StartedError):
        build(replace(spec(small_checkpoint, copy), **change), stop)
    assert read_manifest(copy).precision == "fp32", "a build that fails leaves the old engines"


def test_a_change_in_any_room_is_another_fingerprint(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = shutil.copytree(ROOT / "engines", tmp_path / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    assert building_spec.ENGINES == ROOT / "engines"
    monkeypatch.setattr(building_spec, "ENGINES", engines)
    asked, target = spec(small_checkpoint, tmp_path / "out"), resolve("cpu", "fp32", Machine("a CPU"))

    def fingerprint() -> str:
        return fingerprint_of(asked, target, ("weights",), {})

    rooms = sorted({path.parent for path in engines.rglob("*.py")})
    assert engines / "models" in rooms
    assert engines / "backends" / "cpu" in rooms
    assert engines / "kernels" / "text" in rooms
    before = fingerprint()
    for room in rooms:
        file = next(path for path in sorted(room.glob("*.py")))
        kept = file.read_bytes()
        file.write_bytes(kept + b"# changed\n")
        assert fingerprint() != before, room
        file.write_bytes(kept)
    assert fingerprint() == before
    (engines / "models" / "new.cu").touch()
    assert fingerprint() != before


def test_a_damaged_folder_is_built_again(copy: Path, small_checkpoint: Path) -> None:
    os.truncate(copy / "decoder-64x64.bin", 10)
    with pytest.raises(StartedError):
        build(spec(small_checkpoint, copy), stop)


class StartedError(Exception):
    """A build started, although nothing has changed."""


def stop(*_: object) -> None:
    raise StartedError


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p / "decoder-64x64.bin", 10), "decoder-64x64.bin has 10 bytes"),
    "changed": (lambda p: flip(p / "transformer-64x64.bin"), "transformer-64x64.bin was changed"),
    "missing": (lambda p: (p / "encoder-64x64.xml").unlink(), "encoder-64x64.xml is missing"),
    "no manifest": (lambda p: (p / MANIFEST_FILE).unlink(), "has no manifest.json"),
    "cut manifest": (lambda p: os.truncate(p / MANIFEST_FILE, 100), "manifest.json is damaged"),
    "empty manifest": (lambda p: (p / MANIFEST_FILE).write_text("{}"), "has format None, this version reads 1"),
    "field missing": (lambda p: edit(p, "sizes", None), "manifest.json is damaged"),
    "other checkpoint": (lambda p: edit(p, "checkpoint_sha256", "0" * 64), "with weights 000000000000, and "),
    "other gpu": (
        lambda p: edit(edit(p, "compute_capability", "8.9"), "device", "rtx4090"),
        r"built for rtx4090 \(compute capability 8.9\), this machine has no NVIDIA GPU",
    ),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(folder: Path, key: str, value: object) -> Path:
    values = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**values, key: value}))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_in_one_line_with_the_remedy(
    damage: str, copy: Path, small_checkpoint: Path
) -> None:
    break_it, message = DAMAGES[damage]
    break_it(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_engine(str(small_checkpoint), engine_dir=str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert "build_engine.py" in str(caught.value) or "build it again" in str(caught.value)


def test_engines_that_never_ran_are_compared_when_they_are_first_loaded(copy: Path, small_checkpoint: Path) -> None:
    edit(copy, "executed", False)
    load_engine(str(small_checkpoint), engine_dir=str(copy))
    path = copy / "reference-64x64.safetensors"
    tensors = load_file(path)
    tensors["velocity"][0, 0, 0, 0] += 1
    save_file(tensors, path)
    edit(copy, "references", {"64x64": asdict(FileRecord.of(path))})
    with pytest.raises(
        ParityError, match=r"first run on this machine: transformer at 64x64: too far .*build_engine\.py"
    ):
        load_engine(str(small_checkpoint), engine_dir=str(copy))
    path.write_bytes(b"not tensors")
    edit(copy, "references", {"64x64": asdict(FileRecord.of(path))})
    with pytest.raises(ArtifactError, match=r"reference-64x64\.safetensors cannot be read"):
        load_engine(str(small_checkpoint), engine_dir=str(copy))


def test_what_was_compiled_earlier_is_compared_whenever_it_is_loaded(copy: Path, small_checkpoint: Path) -> None:
    def load() -> None:
        load_engine(str(small_checkpoint), engine_dir=str(copy))

    load()
    path = copy / "reference-64x64.safetensors"
    tensors = load_file(path)
    tensors["velocity"][0, 0, 0, 0] += 1
    save_file(tensors, path)
    edit(copy, "references", {"64x64": asdict(FileRecord.of(path))})
    with pytest.raises(
        ParityError, match=r"compiled earlier: transformer at 64x64 in batches of 1: .*; remove .*cache$"
    ):
        load()
    shutil.rmtree(copy / "cache")
    load()


def test_engines_built_in_place_never_meet_what_the_old_ones_were_compiled_to(copy: Path) -> None:
    artifact = read_manifest(copy).artifacts[0]

    def from_cache(artifact: Artifact) -> tuple[int, ...]:
        graph = open_artifact("openvino", "openvino", copy, artifact, Scratch(torch.device("cpu")))
        assert isinstance(graph, OpenVinoGraph)
        return graph.from_cache

    from_cache(artifact)
    assert from_cache(artifact) == artifact.batches
    other = replace(artifact, files=tuple(replace(file, sha256="0" * 64) for file in artifact.files))
    assert from_cache(other) == ()


def test_a_decoder_that_overflows_on_the_card_is_told(engines: Path) -> None:
    def graph(name: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        outputs = {"transformer": [reference.output("transformer")], "decoder": [torch.zeros(2), torch.zeros(2)]}
        return lambda _: outputs[name]

    reference = Reference.load(engines / "reference-64x64.safetensors")
    with pytest.raises(ParityError, match=r"NaN or infinity .*build with --precision bf16"):
        reference.compare(graph, torch.float32)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"backend": "eager"}, "backend: got 'eager', and the engines in .* are of 'openvino'"),
        ({"precision": "bf16"}, "precision: got 'bf16', and the engines in .* are fp32"),
    ],
)
def test_a_wish_that_contradicts_the_engines_is_refused(
    asked: dict[str, str], message: str, engines: Path, small_checkpoint: Path
) -> None:
    with pytest.raises(BackendError, match=message):
        load_engine(str(small_checkpoint), engine_dir=str(engines), **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "precision: got 'fp8', a CPU engine is built in fp32, bf16"),
        ({"gpu": "native"}, "--gpu native needs an NVIDIA GPU and none was found; use"),
        ({"gpu": "h100", "precision": "fp16"}, "TensorRT builds for an H100 on an H100 only"),
        ({"sizes": ((64, 40),)}, "sizes: got 64x40, both sides must be multiples of 32"),
        ({"batches": ()}, "batches: got none, allowed 1 to 64"),
        ({"steps": (5,)}, "steps: got 5, allowed 1 to 4"),
        ({"model": "nowhere"}, "model: 'nowhere' is no folder"),
    ],
)
def test_what_cannot_be_built_is_refused(
    change: dict[str, object], message: str, small_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SprintError, match=message):
        build(replace(spec(small_checkpoint, tmp_path / "out"), **change))
    assert not list(tmp_path.iterdir())


def test_engines_too_far_from_the_reference_are_not_kept(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(module: nn.Module, name: str, inputs: dict[str, Tensor], path: Path) -> None:
        if name == "transformer":
            module.transformer_blocks[0].ff.conv_point.weight.zero_()
        export(module, name, inputs, path)

    export = building.export_onnx
    monkeypatch.setattr(building, "export_onnx", forgetful)
    with pytest.raises(ParityError, match="transformer at 64x64: too far from its reference: relative error"):
        build(spec(small_checkpoint, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_that_overflows_fp16_runs_in_bf16_and_a_transformer_is_refused(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    target = Target("rtx4090", "tensorrt", "tensorrt_rtx", (8, 9), executable=False)
    work = _Build(
        spec(small_checkpoint, tmp_path, "fp8"), open_checkpoint(str(small_checkpoint)), target, tmp_path, no_progress
    )
    work.choose_precision("decoder", {"up_blocks.0": 30_000.0})
    assert work.precisions == {"decoder": "fp16"}
    work.choose_precision("decoder", {"up_blocks.0": 1.0, "up_blocks.1": 40_000.0})
    work.choose_precision("transformer", {"blocks.0": 1.0})
    assert work.precisions == {"decoder": "bf16", "transformer": "fp8"}
    assert work.reasons == {"decoder": "decoder.up_blocks.1 reaches 40000 on real prompts, and fp16 holds 65504"}
    with pytest.raises(BuildError, match=r"transformer\.blocks\.1 reaches 40000 .*build with --precision bf16"):
        work.choose_precision("transformer", {"blocks.1": 40_000.0})


def test_fp8_is_calibrated_in_fp32_which_every_cpu_is_fast_in(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    told: list[str] = []

    def calibrated(module: nn.Module, *_: object) -> nn.Module:
        seen.append(next(module.parameters()).dtype)
        return module

    monkeypatch.setattr(building, "quantize", calibrated)
    target = Target("rtx4090", "tensorrt", "tensorrt_rtx", (8, 9), executable=False)
    checkpoint = open_checkpoint(str(small_checkpoint))
    asked = replace(spec(small_checkpoint, tmp_path, "fp8"), sizes=((64, 64),))
    work = _Build(asked, checkpoint, target, tmp_path, lambda *step: told.append(str(step)))
    work.precisions["transformer"] = "fp8"
    assert next(work.module("transformer").parameters()).dtype == torch.float16
    assert seen == [torch.float32]
    assert told == ["(0, 11, 'calibration of the transformer')"]


def test_the_autoencoders_batches_leave_the_card_room(small_checkpoint: Path, tmp_path: Path) -> None:
    target = Target("rtx4090", "tensorrt", "tensorrt_rtx", (8, 9), executable=False, memory=24e9)
    checkpoint = open_checkpoint("random:sprint-0.6b")
    work = _Build(
        replace(spec(small_checkpoint, tmp_path), batches=(1, 2, 4, 8)), checkpoint, target, tmp_path, no_progress
    )
    work.precisions.update({"transformer": "fp16", "decoder": "fp16", "encoder": "fp16"})
    assert work.batches("decoder", (1024, 1024)) == (1, 2)
    assert work.batches("decoder", (512, 512)) == (1, 2, 4, 8)
    assert work.batches("decoder", (2048, 2048)) == (1,)
    assert work.batches("transformer", (2048, 2048)) == (1, 2, 4, 8)
    assert replace(work, target=replace(target, memory=None)).batches("decoder", (2048, 2048)) == (1, 2, 4, 8)


# A build in a process of its own, which the tests kill or limit.


def command(model: Path, out: Path) -> list[str]:
    line = ["--model", str(model), "--gpu", "cpu", "--precision", "fp32", "--out", str(out), "--batches", "1"]
    return [sys.executable, str(ROOT / "build_engine.py"), *line]


def test_a_killed_build_leaves_nothing_that_loads_and_the_next_one_cleans_up(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engines"
    with subprocess.Popen(command(small_checkpoint, out), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".engines.building-*/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load_engine(str(small_checkpoint), engine_dir=str(out))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(StartedError):
        build(spec(small_checkpoint, out), stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(small_checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(small_checkpoint, tmp_path / "engines"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == DISK_FULL
    last = done.stderr.splitlines()[-1]
    assert last.startswith("build_engine.py: out: file size limit reached while writing")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["--sizes 1024", "--sizes axb", "--batches one", "--gpu a100", "--precision int4"])
def test_a_wrong_word_on_the_command_line_is_named(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"--model": "tiny", "--gpu": "cpu", "--precision": "fp32", "--out": "x"}
    flag, value = line.split()
    words[flag] = value
    with pytest.raises(SystemExit) as caught:
        build_engine.parse([word for pair in words.items() for word in pair])
    assert caught.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "folder"),
    [("models/tiny", "tiny-cpu-fp32"), ("random:sprint-0.6b", "random-sprint-0.6b-cpu-fp32")],
)
def test_without_a_folder_the_build_is_named_after_what_it_is(model: str, folder: str) -> None:
    spec = build_engine.parse(["--model", model, "--gpu", "cpu", "--precision", "fp32"])
    assert spec.out == Path("artifacts") / folder


def test_errors_of_every_kind_become_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert issubclass(CheckpointError, SprintError)
    line = ["--model", "nowhere", "--gpu", "cpu", "--precision", "fp32", "--out", str(tmp_path / "out")]
    assert build_engine.main(line) == 1
    assert capsys.readouterr().err.startswith("build_engine.py: model: 'nowhere' is no folder")


def test_a_paired_check_of_whole_images_goes_into_the_manifest(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "export_onnx", None)  # a new build would fail
    line = read_manifest(copy).command.split()[2:]
    line[line.index("--out") + 1] = str(copy)
    assert read_manifest(copy).quality is None
    assert build_engine.main([*line, "--quality"]) == 0
    found = read_manifest(copy).quality
    assert found == json.loads(capsys.readouterr().out)["quality"]
    assert found is not None
    assert set(found) == {"1", "2"}
    for check in found.values():
        assert check["images"] == 16
        assert 40 < check["worst_db"] <= check["psnr_db"]
        assert check["low_db"] <= check["psnr_db"] <= check["high_db"]


def test_engines_of_another_machine_make_no_images(copy: Path) -> None:
    manifest = replace(read_manifest(copy), executed=False)
    with pytest.raises(BuildError, match="do not run here"):
        build_engine.check_quality(BuildSpec("m", "h100", "fp16", copy), building.BuildResult(manifest, changed=False))
