"""Native engines: a mismatch is refused in one line, and a failed build leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from native_engines import ROOT, drawn, loaded, spec

import build_engine
from bench.budget.card import Card
from bench.budget.engine import _NoWeights
from engines.artifacts.candidates import candidates
from engines.artifacts.catalog import find_engine
from engines.artifacts.manifest import MANIFEST_FILE, read_manifest
from engines.artifacts.native import loading
from engines.build.builder import build
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.device.hardware import Machine
from engines.errors import ArtifactError, BackendError, BuildError
from engines.loader import load_engine
from engines.pipeline.native import NativeBackend


def test_the_manifest_names_what_decides(for_hopper: Path, ours: Path) -> None:
    made = read_manifest(for_hopper)
    assert (made.vendor, made.backend, made.compute_capability, made.executed) == (
        "native",
        "cuda-graph",
        "9.0",
        False,
    )
    assert made.versions.keys() >= {"torch", "triton", "python"}
    assert made.command.endswith("--vendor native")
    assert made.pictures["64x64"]["psnr_db"] > 35
    assert {file.name for file in made.files} == {
        path.relative_to(for_hopper).as_posix() for path in for_hopper.rglob("*") if path.is_file()
    } - {MANIFEST_FILE}
    made.check_files(for_hopper)
    told = loaded(ours, for_hopper).info.manifest
    assert told is not None
    assert (told["vendor"], "shared" in told) == ("native", False)
    assert not build(spec(ours, for_hopper)).changed


def test_engine_auto_finds_it_on_its_card_alone(for_hopper: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found_on(
        capability: tuple[int, int], precision: str = "bf16", max_batch: int = 1
    ) -> tuple[Path | None, list[str]]:
        card = Machine("a CPU", "a card", capability, "580.65.06", 80e9)
        monkeypatch.setattr("engines.artifacts.candidates.this_machine", lambda: card)
        (candidate,) = candidates(
            str(ours),
            device=None,
            backend="auto",
            precision=precision,
            sizes=(),
            max_batch=max_batch,
            decoder=None,
            variant=None,
            installed=lambda name: name == "triton" or None,
        ).each
        return find_engine(for_hopper.parent, candidate.requirements)

    assert found_on((9, 0)) == (for_hopper, [])
    for reasons in (found_on((8, 9))[1], found_on((9, 0), "fp8")[1], found_on((9, 0), max_batch=2)[1]):
        assert len(reasons) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def older(folder: Path, package: str) -> None:
    values = json.loads((folder / MANIFEST_FILE).read_text())
    values["versions"][package] = "1.2.3"
    (folder / MANIFEST_FILE).write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights changed": (lambda p: flip(p / "transformer-1.safetensors"), r"transformer-1.safetensors was changed"),
    "header changed": (lambda p: overwrite(p / "text-1.safetensors"), r"text-1.safetensors was changed"),
    "weights cut": (lambda p: os.truncate(p / "text-1.safetensors", 100), "text-1.safetensors has 100 bytes"),
    "kernel changed": (lambda p: flip(next(p.rglob("*.cubin"))), r"\.cubin was changed"),
    "kernel missing": (lambda p: next(p.rglob("*.cubin")).unlink(), r"\.cubin is missing"),
    "other triton": (lambda p: older(p, "triton"), r"built by triton 1\.2\.3, here is "),
    "other torch": (lambda p: older(p, "torch"), r"built by torch 1\.2\.3, here is "),
    "other python": (lambda p: older(p, "python"), r"built by python 1\.2\.3, here is "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_in_one_line_with_the_remedy(damage: str, copy: Path, ours: Path) -> None:
    break_it, message = DAMAGES[damage]
    break_it(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        loaded(ours, copy)
    assert "\n" not in str(caught.value)
    assert "build it again: python build_engine.py" in str(caught.value)


def test_another_card_code_or_checkpoint_is_refused(
    for_hopper: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match=r"built for h100 \(compute capability 9.0\), this machine has no NVIDIA"):
        load_engine(str(ours), engine_dir=str(for_hopper), device="cpu")
    other = Path(shutil.copytree(ours, tmp_path / "other"))
    assert drawn(loaded(other, for_hopper)), "copied later, and the same"
    flip(other / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ArtifactError, match=r"built from .* with weights"):
        loaded(other, for_hopper)
    monkeypatch.setattr(loading, "code_digest", lambda: "another")
    with pytest.raises(ArtifactError, match="built by another version of this code; build it again"):
        loaded(ours, for_hopper)


@pytest.mark.usefixtures("not_compiled")
def test_what_cannot_be_built_is_refused_and_leaves_nothing(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engines.backends.cuda.text.CudaTextBody.__call__", lambda _, ids, __: torch.ones(*ids.shape, 48)
    )
    with pytest.raises(BuildError, match="text encoder: too far from its reference: SQNR"):
        build(spec(small_checkpoint, tmp_path / "engine"))
    assert not list(tmp_path.iterdir())


def test_without_a_c_compiler_the_build_says_so(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr("engines.kernels.launch_code.FOLDER", tmp_path)
    with pytest.raises(BuildError, match="no C compiler is found, and kernels are launched through C; install gcc"):
        build(spec(small_checkpoint, tmp_path / "engine"))
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_nothing_that_loads_and_no_process(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    words = [
        "--model",
        str(small_checkpoint),
        "--gpu",
        "h100",
        "--vendor",
        "native",
        "--precision",
        "bf16",
        "--jobs",
        "1",
    ]
    line = [sys.executable, str(ROOT / "build_engine.py"), *words, "--out", str(out)]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".engine.building-*/kernels/*/*.cubin")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load_engine(str(small_checkpoint), engine_dir=str(out))
    while compiling(tmp_path):
        time.sleep(0.05)
    with pytest.raises(StartedError):
        build(spec(small_checkpoint, out), stop)
    assert not list(tmp_path.iterdir())


def compiling(folder: Path) -> bool:
    """Returns whether a process has an open file there."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue  # ended meanwhile
    return any(b"native.compiling" in line and str(folder).encode() in line for line in lines)


class StartedError(Exception):
    """A build started, although nothing has changed."""


def stop(*_: object) -> None:
    raise StartedError


def test_the_command_line_takes_a_vendor(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--gpu", "h100", "--precision", "bf16"]
    assert build_engine.parse([*words, "--vendor", "native", "--jobs", "3"]).vendor == "native"
    assert build_engine.parse(words).vendor is None
    with pytest.raises(SystemExit):
        build_engine.parse([*words, "--vendor", "onnx"])
    assert "--vendor" in capsys.readouterr().err


def test_the_checkpoint_alone_and_its_engine_share_one_comparison(
    for_hopper: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels and their shapes are the same, so the second start finds the proof of the first."""
    told = list[str]()

    def on(*given: object) -> NoReturn:
        told.append(str(given[-1]))
        raise BackendError("enough is known")

    monkeypatch.setattr(NativeBackend, "on", on)
    monkeypatch.setattr(loading, "use_compiled_kernels", lambda _: None)
    monkeypatch.setattr(loading, "check_fit", lambda *_: None)
    checkpoint = open_checkpoint(str(ours))
    starts: list[tuple[Checkpoint, dict[str, Any]]] = [
        (checkpoint, {"engine_dir": str(for_hopper)}),
        (replace(checkpoint, weights=_NoWeights(checkpoint.weights)), {"backend": "cuda-graph", "precision": "bf16"}),
    ]
    with Card("NVIDIA H100 80GB HBM3", 132, (9, 0)).present():
        for model, options in starts:
            for max_batch in (1, 2):
                with pytest.raises(BackendError, match="enough"):
                    load_engine(model, device="cuda", max_batch=max_batch, **options)
    built, again, plain, larger = told
    assert built == again == plain, "the engine was built for batches of one"
    assert larger != plain, "a larger batch has tiles of its own"
