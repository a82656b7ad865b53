"""Folders of engines: the list, the removal of old ones, and the candidates for a build."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from manifests import MANIFEST

import build_engine
from engines.artifacts import catalog
from engines.artifacts.candidates import Candidate, candidates
from engines.artifacts.vendors import VENDORS, Installed, Vendor
from engines.build.targets import resolve
from engines.device.hardware import Machine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes folders of engines: current, of an earlier version, vendor or format; and a folder without engines."""

    def versions(*names: str) -> Mapping[str, str]:
        return {"openvino": "2026.1"} if names == ("openvino",) else {}

    monkeypatch.setattr(catalog, "package_versions", versions)
    manifests = {
        "fits": MANIFEST,
        "earlier": replace(MANIFEST, versions={"openvino": "2025.3"}),
        "elsewhere": replace(MANIFEST, vendor="tensorrt", versions={"tensorrt": "10.13"}),
        "format": replace(MANIFEST, format=0),
    }
    for name, manifest in manifests.items():
        (tmp_path / name).mkdir()
        manifest.write(tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / ".fits.lock").touch()
    return tmp_path


def test_every_folder_of_engines_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engine.main(["--list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(folder / name) for name in ("earlier", "elsewhere", "fits", "format")
    ]
    assert lines[0].endswith("old: built by openvino 2025.3, here is 2026.1")
    assert "tiny openvino fp32 64x64 on a CPU, 0 MB" in lines[2]
    assert ", old: " not in lines[1] + lines[2]


def test_engines_of_old_versions_are_removed_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engine.main(["--prune", str(folder)]) == 0
    assert capsys.readouterr().out.count("removed ") == 2
    assert sorted(path.name for path in folder.iterdir()) == [".fits.lock", "elsewhere", "fits", "mine"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert build_engine.main(["--list", str(tmp_path / "nowhere")]) == 0


def installed(*names: str) -> Installed:
    return lambda name: True if name in names else None


@pytest.mark.parametrize(
    ("packages", "precision", "vendors", "missing"),
    [
        (("openvino", "onnx", "onnxscript"), None, ["openvino"], ()),
        (("openvino",), "bf16", ["openvino"], ("onnx", "onnxscript")),
        ((), None, [], ()),
        (("openvino",), "int8", [], ()),
    ],
)
def test_candidates_of_a_cpu(
    packages: tuple[str, ...], precision: str | None, vendors: list[str], missing: tuple[str, ...]
) -> None:
    found = candidates(
        model="tiny",
        device="cpu",
        backend="auto",
        precision=precision,
        sizes=(),
        max_batch=6,
        decoder=None,
        variant=None,
        installed=installed(*packages),
    )
    assert [one.vendor for one in found.each] == vendors
    for one in found.each:
        assert one.missing == missing
        assert one.requirements.sizes == ((256, 256),)
        spec = build_engine.parse([*one.arguments, "--out", "x"])
        assert (spec.sizes, spec.batches, spec.precision) == (((256, 256),), (1, 2, 4, 6), precision or "fp32")
    assert bool(found.why_none)


def test_a_candidate_with_a_second_decoder_needs_an_engine_that_holds_it() -> None:
    def candidate(fast_decoder: str | None) -> Candidate:
        (one,) = candidates(
            model="tiny",
            device="cpu",
            backend="auto",
            precision=None,
            sizes=(),
            max_batch=2,
            decoder=None,
            variant=None,
            fast_decoder=fast_decoder,
            installed=installed("openvino", "onnx", "onnxscript"),
        ).each
        return one

    plain, both = candidate(None), candidate("taesana")
    assert build_engine.parse([*both.arguments, "--out", "x"]).fast_decoder == "taesana"
    assert "--fast-decoder" not in plain.arguments
    assert plain.name != both.name
    needed = both.requirements
    holds = replace(
        MANIFEST,
        checkpoint_sha256=needed.checkpoint_sha256,
        sizes=needed.sizes,
        versions={"openvino": str(needed.version)},
    )
    assert needed.mismatch(holds) == "without a second decoder"
    assert needed.mismatch(replace(holds, fast_decoder="lite", fast_decoder_sha256="1")) == "with the fast decoder lite"
    holds_both = replace(holds, fast_decoder="taesana", fast_decoder_sha256=needed.fast_decoder_sha256)
    assert needed.mismatch(holds_both) is None
    assert plain.requirements.mismatch(holds_both) is None


@pytest.mark.parametrize(
    ("packages", "capability", "serving"),
    [
        (("tensorrt", "tensorrt_rtx"), (9, 0), ["tensorrt"]),
        (("tensorrt", "tensorrt_rtx"), (8, 9), ["tensorrt"]),
        (("tensorrt_rtx",), (8, 9), ["tensorrt_rtx"]),
        (("tensorrt_rtx", "openvino"), (9, 0), []),
        (("tensorrt", "triton"), (9, 0), ["tensorrt", "native"]),
        (("tensorrt_rtx", "triton"), (9, 0), ["native"]),
        (("tensorrt_rtx", "triton"), (8, 9), ["tensorrt_rtx", "native"]),
        (("tensorrt", "triton"), (8, 0), ["tensorrt"]),
    ],
)
def test_vendors_of_a_card(packages: tuple[str, ...], capability: tuple[int, int], serving: list[str]) -> None:
    def fits(vendor: Vendor) -> bool:
        return vendor.serves("cuda", capability, "fp8") and vendor.can_run(installed(*packages))

    assert [vendor.name for vendor in VENDORS if fits(vendor)] == serving


@pytest.mark.parametrize(
    ("packages", "programs", "missing"),
    [
        (("tensorrt", "onnx", "onnxscript", "triton"), ("gcc",), {"tensorrt": (), "native": ()}),
        (("triton",), ("clang",), {"native": ()}),
        (("tensorrt", "onnx", "onnxscript", "triton"), (), {"tensorrt": (), "native": ("gcc or clang",)}),
    ],
)
def test_candidates_of_a_card(
    packages: tuple[str, ...],
    programs: tuple[str, ...],
    missing: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine("a CPU", "NVIDIA H100 80GB HBM3", (9, 0), "580.65.06", 80e9)
    monkeypatch.setattr("engines.artifacts.candidates.this_machine", lambda: machine)
    monkeypatch.setattr("engines.kernels.launch_code.FOLDER", Path("/nowhere"))
    found = candidates(
        model="tiny",
        device=None,
        backend="auto",
        precision=None,
        sizes=(),
        max_batch=8,
        decoder=None,
        variant=None,
        installed=installed(*packages),
        which=installed(*programs),
    )
    assert {one.vendor: one.missing for one in found.each} == missing
    for one in found.each:
        assert (one.requirements.capability, one.requirements.precision) == ("9.0", "bf16")
        spec = build_engine.parse([*one.arguments, "--out", "x"])
        assert (spec.gpu, spec.precision, spec.batches) == ("native", "bf16", (1, 2, 4, 8))
        everything = installed("tensorrt", "triton")
        assert resolve(spec.gpu, spec.precision, machine, everything, spec.vendor).vendor == one.vendor


def test_a_native_engine_is_what_its_candidate_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("a CPU", "NVIDIA GeForce RTX 4090", (8, 9), "580.65.06", 24e9)
    monkeypatch.setattr("engines.artifacts.candidates.this_machine", lambda: machine)
    (one,) = candidates(
        model="tiny",
        device="cuda:0",
        backend="cuda-graph",
        precision="fp8",
        sizes=(),
        max_batch=2,
        decoder=None,
        variant=None,
        installed=installed("tensorrt", "triton"),
        which=installed("gcc"),
    ).each
    needed = one.requirements
    manifest = replace(
        MANIFEST,
        checkpoint_sha256=needed.checkpoint_sha256,
        vendor="native",
        compute_capability="8.9",
        precision="fp8",
        sizes=needed.sizes,
        batches=(1, 2),
        versions={"torch": "2.13.0", "triton": "3.7.1"},
    )
    assert needed.mismatch(manifest) is None
    assert needed.mismatch(replace(manifest, compute_capability="9.0")) == f"for native on {MANIFEST.device}"
