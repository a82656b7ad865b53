"""torch-tensorrt, which only a GPU host can import: calls on a fake, errors, and programs on the card."""

import sys
from pathlib import Path
from typing import Any

import fake_torch_tensorrt as fake
import pytest
import torch
from random_modules import SHAPE, random_module

from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.tensorrt.torch_tensorrt import compile_with, load_vendor, torch_tensorrt
from engines.build.example_inputs import example_inputs
from engines.errors import BackendError, ParityError
from engines.loader import load_engine

SIZE = (SHAPE.width * SHAPE.compression, SHAPE.height * SHAPE.compression)


def spec(name: ModuleName, cache: Path, device: str = "cpu") -> ModuleSpec:
    return ModuleSpec(name, torch.float32, torch.device(device), 2, SHAPE.tokens, (SIZE,), cache=cache)


@pytest.fixture(autouse=True)
def forget() -> None:
    fake.calls.clear()
    fake.settings.clear()


@pytest.mark.parametrize("name", ["transformer", "decoder", pytest.param("fast_decoder", marks=pytest.mark.slow)])
def test_a_program_equals_its_module_and_is_compiled_once(name: ModuleName, tmp_path: Path) -> None:
    module = random_module(name)
    with torch.inference_mode():  # as in an engine
        for start in range(2):
            run = compile_with(fake, module, spec(name, tmp_path))
            for batch in (2, 1, 2):
                inputs = example_inputs(name, SHAPE, batch, torch.float32)
                actual, expected = run(**inputs), module(**inputs)
                if name == "transformer":
                    actual, expected = [actual], [expected]
                for one, other in zip(actual, expected, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            assert fake.calls == (["load"] * 2 if start else ["compile", "save", "load"] * 2)
            fake.calls.clear()
    assert not list(tmp_path.glob("**/*.[0-9]*.ep")), "a file that was begun"


def test_caches_lie_in_the_folder_it_is_given(tmp_path: Path) -> None:
    compile_with(fake, random_module("encoder"), spec("encoder", tmp_path))(
        **example_inputs("encoder", SHAPE, 1, torch.float32)
    )
    [chosen] = fake.settings
    folder = tmp_path / "torch-tensorrt-2.14.0-none"
    assert chosen["engine_cache_dir"] == str(folder / "engines")
    assert chosen["timing_cache_path"] == str(folder / "timing.bin")
    assert (chosen["cache_built_engines"], chosen["reuse_cached_engines"]) == (True, True)
    assert chosen["immutable_weights"] is False, "or nothing is ever found in the engine cache"
    [program] = folder.glob("*.ep")
    assert program.name.startswith("encoder-")
    assert program.name.endswith(f"-{SIZE[1]}x{SIZE[0]}-b1.ep")


def test_other_weights_get_a_program_of_their_own(tmp_path: Path) -> None:
    inputs = example_inputs("encoder", SHAPE, 1, torch.float32)
    module = random_module("encoder")
    first = compile_with(fake, module, spec("encoder", tmp_path))(**inputs)
    next(module.encoder.parameters()).mul_(2)
    second = compile_with(fake, module, spec("encoder", tmp_path))(**inputs)
    assert len(list(tmp_path.glob("*/*.ep"))) == 2
    assert not torch.equal(first, second)


def test_a_program_of_something_else_is_refused(tmp_path: Path) -> None:
    inputs = example_inputs("encoder", SHAPE, 1, torch.float32)
    module, other = random_module("encoder"), random_module("encoder")
    next(other.encoder.parameters()).mul_(2)
    compile_with(fake, other, spec("encoder", tmp_path))(**inputs)
    [wrong] = tmp_path.glob("*/*.ep")
    compile_with(fake, module, spec("encoder", tmp_path))(**inputs)
    [right] = set(tmp_path.glob("*/*.ep")) - {wrong}
    wrong.rename(right)
    with pytest.raises(ParityError, match=rf"torch-tensorrt: encoder-\S+: too far from .*; remove {right}"):
        compile_with(fake, module, spec("encoder", tmp_path))(**inputs)


def test_other_sizes_run_as_they_are(tmp_path: Path) -> None:
    run = compile_with(fake, random_module("encoder"), spec("encoder", tmp_path))
    pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert torch.equal(run(pixels), random_module("encoder")(pixels))
    assert not fake.calls


def test_a_damaged_program_and_a_refused_one_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = example_inputs("encoder", SHAPE, 1, torch.float32)
    compile_with(fake, random_module("encoder"), spec("encoder", tmp_path))(**inputs)
    [path] = tmp_path.glob("*/*.ep")
    path.write_bytes(b"cut")
    with pytest.raises(BackendError, match=rf"torch-tensorrt: {path} cannot be loaded .*; remove it"):
        compile_with(fake, random_module("encoder"), spec("encoder", tmp_path))(**inputs)
    path.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no converter for this\nand more")

    monkeypatch.setattr(fake.dynamo, "compile", refuse)
    with pytest.raises(BackendError, match=r"torch-tensorrt: encoder-\S+ cannot be compiled: no converter for this$"):
        compile_with(fake, random_module("encoder"), spec("encoder", tmp_path))(**inputs)
    assert not list(tmp_path.glob("*/*.ep"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("engines.backends.tensorrt.torch_tensorrt.import_module", absent)
    with pytest.raises(
        BackendError, match=r"^torch-tensorrt: the package is missing; pip install '\.\[torch-tensorrt\]'$"
    ):
        load_engine(str(small_checkpoint), backend="torch-tensorrt", device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found no NVIDIA driver\non this system"),
        ImportError("libtorch_cuda.so: cannot open shared object file", name="torch_tensorrt._C"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_a_package_that_cannot_be_used_says_why(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(_: str) -> Any:
        raise error

    monkeypatch.setattr("engines.backends.tensorrt.torch_tensorrt.import_module", unusable)
    with pytest.raises(BackendError, match=f"cannot be used here: {str(error).splitlines()[0]}$"):
        load_vendor()


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    with pytest.raises(BackendError, match="torch-tensorrt: needs an NVIDIA GPU, and the device is cpu; use eager"):
        torch_tensorrt(random_module("encoder"), spec("encoder", tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer", "decoder", "encoder"])
def test_programs_on_the_card_equal_the_module(name: ModuleName, tmp_path: Path) -> None:
    pytest.importorskip("torch_tensorrt", reason="the extra 'torch-tensorrt' is not installed")
    module = random_module(name).cuda()
    for _ in range(2):
        run = torch_tensorrt(module, spec(name, tmp_path, "cuda"))
        inputs = {key: value.cuda() for key, value in example_inputs(name, SHAPE, 2, torch.float32).items()}
        actual, expected = run(**inputs), module(**inputs)
        actual, expected = (actual[0], expected[0]) if name == "decoder" else (actual, expected)
        # TF32 rounds the factors, which changes some of the pixels by one.
        torch.testing.assert_close(actual.float(), expected.float(), atol=2 if name == "decoder" else 2e-2, rtol=2e-2)
