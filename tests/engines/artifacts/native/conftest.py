"""Native engines for several test files. They are read-only: a test that changes one copies it first."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from native_engines import compile_some, spec
from small_checkpoint import KERNEL_AUTOENCODER, randomise_weights, with_settings

from engines.build.builder import build
from engines.build.spec import BuildSpec


@pytest.fixture(scope="package")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the small checkpoint with a decoder that our kernels can run."""
    from diffusers import AutoencoderDC

    made = with_settings(folder, tmp_path_factory.mktemp("ours") / "sprint", '{"default_size": [64, 64]}')
    (made / "vae").unlink()
    vae = AutoencoderDC(**asdict(KERNEL_AUTOENCODER))
    randomise_weights(vae, 2).save_pretrained(made / "vae")  # type: ignore[operator]  # heat gives what it is given
    return made


def built(asked: BuildSpec, place: Path | None = None) -> Path:
    """Builds with a part of the kernels; place: the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place or Path.cwd())
        patch.setattr("engines.artifacts.native.compiling.compile_kernels", compile_some)
        assert build(asked).changed
    return asked.out


@pytest.fixture(scope="package")
def for_hopper(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(spec(ours, tmp_path_factory.mktemp("hopper") / "engine"))


@pytest.fixture(scope="package")
def for_ada(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds an engine with a decoder that our kernels cannot run, from a relative path of the checkpoint."""
    asked = spec(Path(small_checkpoint.name), tmp_path_factory.mktemp("ada") / "engine", "rtx4090")
    return built(asked, small_checkpoint.parent)


@pytest.fixture
def copy(for_hopper: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(for_hopper, tmp_path / "engine"))


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.artifacts.native.compiling.compile_kernels", lambda *_: {})
