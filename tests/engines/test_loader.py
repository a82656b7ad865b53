"""The loader's choices and their reasons."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoint import with_settings

from engines.device.hardware import why_no_gpu
from engines.errors import BackendError, CheckpointError
from engines.loader import load_engine
from engines.types import Engine, Job, ReportsMemory

ROOT = Path(__file__).resolve().parents[2]


def test_decides_and_says_why(folder: Path) -> None:
    engine: Engine = load_engine(str(folder), device="cpu")
    assert (engine.info.backend, engine.info.precision, engine.info.device) == ("eager", "fp32", "cpu")
    assert engine.info.reasons["device"] == "cpu: asked for"
    assert set(engine.info.reasons) - {"decoder"} == {"backend", "precision", "device"}
    assert engine.info.checkpoint == str(folder)
    assert set(engine.info.versions) >= {"torch", "tokenizers"}


def test_a_published_checkpoint_gets_upstreams_limits(folder: Path) -> None:
    engine = load_engine(str(folder), max_batch=3)
    assert (engine.limits.default_size, engine.limits.max_batch) == ((1024, 1024), 3)
    assert (engine.info.guidance_trained, engine.info.max_prompt_tokens) == ((4.0, 5.0), 300)
    assert engine.limits.allows_size(512, 2048)
    assert not engine.limits.allows_size(1024, 1040)
    assert not engine.limits.allows_size(2080, 1024)


def test_settings_of_the_folder_reach_the_engine(folder: Path, tmp_path: Path) -> None:
    settings = '{"instruction": false, "max_prompt_tokens": 5, "default_size": [64, 32], "sizes": [[64, 32]]}'
    engine = load_engine(str(with_settings(folder, tmp_path, settings)))
    assert engine.limits.sizes == ((64, 32),)
    engine.warmup()
    [image] = engine.generate([Job("one two three four five", seed=0, width=64, height=32)])
    assert image.prompt_truncated
    assert image.pixels.shape == (32, 64, 3)


def test_the_checkpoint_chooses_the_angle_of_one_step(folder: Path, tmp_path: Path) -> None:
    """As upstream's script for GenEval starts one step, "figures"; several steps start as before."""
    changed = load_engine(
        str(with_settings(folder, tmp_path / "angle", '{"one_step_angle": 1.55413}')), backend="eager"
    )
    figures, paper = (load_engine(str(folder), backend="eager", schedule=name) for name in ("figures", "paper"))
    one, two = (Job("a red circle", 7, 64, 64, steps) for steps in (1, 2))
    assert (changed.generate([one])[0].pixels == figures.generate([one])[0].pixels).all()
    assert (changed.generate([one])[0].pixels != paper.generate([one])[0].pixels).any()
    assert (changed.generate([two])[0].pixels == paper.generate([two])[0].pixels).all()


def test_sides_may_double_within_four_times_the_area(folder: Path, tmp_path: Path) -> None:
    engine = load_engine(str(with_settings(folder, tmp_path, '{"default_size": [128, 64]}')))
    assert engine.limits.allows_size(256, 128)
    assert engine.limits.allows_size(128, 256)
    assert not engine.limits.allows_size(256, 160)
    assert not engine.limits.allows_size(288, 32)


def test_memory_is_reported_where_there_is_a_gpu(small_checkpoint: Path) -> None:
    engine = load_engine(str(small_checkpoint), device="cpu")
    assert isinstance(engine, ReportsMemory)
    assert engine.memory_bytes() == {}


@pytest.mark.gpu
def test_runs_on_a_gpu_in_bf16(small_checkpoint: Path) -> None:
    jobs = [Job("a red circle", seed=seed, width=64, height=64) for seed in range(2)]
    engine = load_engine(str(small_checkpoint))
    assert engine.info.precision == "bf16"
    assert engine.info.device.startswith("cuda")
    assert isinstance(engine, ReportsMemory)
    assert 0 < engine.memory_bytes()["used"] < engine.memory_bytes()["total"]
    reference = load_engine(str(small_checkpoint), device="cpu")
    for rounded, exact in zip(engine.generate(jobs), reference.generate(jobs), strict=True):
        assert 0 < abs(exact.pixels.astype(int) - rounded.pixels.astype(int)).mean() < 12
        assert rounded.stages.denoise > 0


def test_bf16_runs_near_fp32(small_checkpoint: Path) -> None:
    jobs = [Job("a red circle", seed=seed, width=64, height=64) for seed in range(2)]
    engines = [load_engine(str(small_checkpoint), precision=precision, device="cpu") for precision in ("fp32", "bf16")]
    assert engines[1].info.precision == "bf16"
    for exact, rounded in zip(*(engine.generate(jobs) for engine in engines), strict=True):
        difference = abs(exact.pixels.astype(int) - rounded.pixels.astype(int))
        assert 0 < difference.mean() < 12


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"backend": "onnx"}, "backend: got 'onnx', allowed auto, eager"),
        ({"precision": "int4"}, "precision: got 'int4', allowed fp32, bf16, int8"),
        ({"device": "tpu"}, "device: got 'tpu', allowed cpu, cuda"),
        ({"device": "cuda:x"}, "device: got 'cuda:x'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99', but torch "),
        ({"backend": "openvino"}, "openvino runs built engines; build them with python build_engine.py --gpu cpu"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused(asked: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(BackendError, match=message):
        load_engine(str(folder), **asked)


@pytest.mark.parametrize("settings", ['{"default_size": [40, 64]}', '{"sizes": [[96, 96]], "default_size": [64, 64]}'])
def test_a_default_size_that_cannot_run_is_refused(settings: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="default_size"):
        load_engine(str(with_settings(folder, tmp_path, settings)))


def test_a_start_imports_neither_a_compiler_nor_transformers() -> None:
    """Each of them takes more than a second; a start without them takes less than three."""
    program = (
        "import sys; from engines.loader import load_engine; load_engine('tiny', device='cpu').warmup();"
        "print([name for name in ('torch._dynamo', 'sympy', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(
    ("cuda", "driver", "told"),
    [
        (None, None, "is a wheel without CUDA; install the one for CUDA"),
        ("13.0", "535.54", "is a wheel for CUDA 13.0 and the NVIDIA driver 535.54 cannot be used"),
        ("13.0", None, "is a wheel for CUDA 13.0 and no NVIDIA driver is loaded"),
    ],
)
def test_without_a_usable_gpu_driver_and_wheel_are_named(
    cuda: str | None, driver: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr("engines.device.hardware._driver", lambda: None)
    assert told in why_no_gpu(driver)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_was_asked_for_is_never_a_quiet_cpu(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"device: got 'cuda', but torch .* use --device cpu"):
        load_engine(str(folder), device="cuda")
