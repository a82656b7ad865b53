"""A manifest refuses other machines and damage. tests/engines/build/test_builder.py covers its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.artifacts.manifest import Artifact, FileRecord, Manifest, read_manifest
from engines.errors import ArtifactError

ADA = Manifest(
    checkpoint="models/tiny",
    checkpoint_sha256="ab" * 32,
    decoder=None,
    gpu="rtx4090",
    device="NVIDIA GeForce RTX 4090",
    compute_capability="8.9",
    driver="580.1",
    backend="tensorrt",
    vendor="tensorrt",
    precision="fp16",
    sizes=((256, 256), (512, 256)),
    batches=(1, 2),
    steps=(1, 2, 4),
    tokens=300,
    versions={"torch": "2.13.0", "tensorrt": "11.4.0"},
    executed=True,
    command="python build_engine.py --gpu rtx4090 --precision fp8 --out x",
    fingerprint="cd" * 32,
    seconds=1.5,
    pictures={"256x256": {"psnr_db": 60.0}},
    references={"256x256": FileRecord("reference-256x256.safetensors", 3, "ef" * 32)},
    artifacts=(
        Artifact(
            "decoder", (256, 256), "fp16", (1, 2), 1.0, (FileRecord("decoder.engine", 5, "01" * 32),), {"gate": "x"}, {}
        ),
    ),
)


def test_survives_the_disk(tmp_path: Path) -> None:
    ADA.write(tmp_path)
    assert read_manifest(tmp_path) == ADA
    assert [file.name for file in ADA.files] == ["reference-256x256.safetensors", "decoder.engine"]


@pytest.mark.parametrize("value", [{"module": "vae"}, {"size": [256]}, {"files": [{"name": "x"}]}])
def test_an_artifact_of_another_form_is_damage(value: dict[str, object], tmp_path: Path) -> None:
    ADA.write(tmp_path)
    broken = {**ADA.to_dict(), "artifacts": [{**ADA.to_dict()["artifacts"][0], **value}]}
    (tmp_path / "manifest.json").write_text(json.dumps(broken))
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(tmp_path)


def test_the_machine_it_was_built_on_is_accepted() -> None:
    ADA.check_machine("NVIDIA GeForce RTX 4090 (8.9)", "8.9", {"tensorrt": "11.4.0"})
    ADA.check_checkpoint("another name", "ab" * 32)


@pytest.mark.parametrize(
    ("capability", "versions", "message"),
    [
        ("9.0", {"tensorrt": "11.4.0"}, r"built for NVIDIA GeForce RTX 4090 \(compute capability 8.9\), this machine"),
        ("9.0", {}, r"has a card; for this one: python build_engine.py --gpu native --precision fp8 --out x$"),
        (None, {}, r"has a card; for this one: python build_engine.py --gpu cpu --precision fp32 --out x$"),
        ("8.9", {"tensorrt": "10.16.1"}, "built by tensorrt 11.4.0, here is 10.16.1"),
        ("8.9", {}, "built by tensorrt 11.4.0, here is none"),
    ],
)
def test_another_machine_is_refused(capability: str | None, versions: dict[str, str], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        ADA.check_machine("a card", capability, versions)


def test_a_cpu_is_offered_no_vendor_of_gpus() -> None:
    with pytest.raises(ArtifactError, match=r"--gpu cpu --precision fp32 --out x$"):
        replace(ADA, command=f"{ADA.command} --vendor native").check_machine("a card", None, {})


def test_a_cpu_engine_runs_under_another_openvino() -> None:
    cpu = replace(ADA, compute_capability=None, backend="openvino", vendor="openvino")
    cpu.check_machine("no NVIDIA GPU", None, {"openvino": "2025.3"})
