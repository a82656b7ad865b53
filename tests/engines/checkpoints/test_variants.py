"""Checkpoints of save_pretrained and hubs: variants, shards, minimal downloads; and a user without a home."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_hub import Hub, files_of, serving_hub
from program import ROOT, Server
from running_server import read_image
from safetensors.torch import load_file, save_file

from engines.checkpoints.variants import required_files, variant_of
from engines.types import Pixels
from server.errors import EXIT_START

TINY = ROOT / "models/tiny"
PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
BODY = {"prompt": "a red circle on a white background", "seed": 7}


def with_variant(folder: Path, parts: Sequence[str], variant: str, *, plain: bool = False) -> Path:
    """Returns tiny, with the weights of these components under diffusers' names of a variant."""
    shutil.copytree(TINY, folder)
    for part in parts:
        path = folder / part / f"{PARTS[part]}.safetensors"
        shutil.copy(path, path.with_name(f"{PARTS[part]}.{variant}.safetensors"))
        if not plain:
            path.unlink()
    return folder


def shard(folder: Path, part: str, names: Sequence[str], index: str) -> None:
    """Splits the file of a component into files of these names."""
    (whole,) = (folder / part).glob("*.safetensors")
    tensors = load_file(whole)
    weight_map = {key: names[number % len(names)] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key].clone() for key in tensors if weight_map[key] == name}, folder / part / name)
    (folder / part / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def drawn(model: str, *flags: str, **environment: str) -> tuple[Pixels, dict[str, str]]:
    """Returns an image of a served checkpoint, and the reasons of its server."""
    server = Server("--model", model, *flags, **environment)
    try:
        url = server.wait_ready()
        image = httpx.post(f"{url}/generate", json=BODY, timeout=60)
        assert image.status_code == 200
        reasons: dict[str, str] = httpx.get(f"{url}/v1/info").json()["reasons"]
        return read_image(image.content), reasons
    finally:
        server.process.terminate()
        server.wait_end()


@pytest.fixture(scope="module")
def plain() -> Pixels:
    image, reasons = drawn("tiny")
    assert "variant" not in reasons
    return image


def same(one: Pixels, other: Pixels) -> bool:
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


def test_the_only_variant_is_taken_and_named(plain: Pixels, tmp_path: Path) -> None:
    folder = with_variant(tmp_path / "c", [*PARTS], "fp16")
    for part, stem in PARTS.items():
        names = [f"{stem}-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]
        if part == "vae":
            names = [f"{stem}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
        shard(folder, part, names, f"{stem}.safetensors.index.fp16.json")
    image, reasons = drawn(str(folder))
    assert same(image, plain)
    assert reasons["variant"] == "fp16: the only weights there, of text_encoder, transformer, vae"


def test_what_diffusers_writes_draws_the_same(plain: Pixels, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from diffusers import AutoencoderDC, SanaTransformer2DModel\n"
        "source, target = sys.argv[1:]\n"
        "for kind, part in ((SanaTransformer2DModel, 'transformer'), (AutoencoderDC, 'vae')):\n"
        "    kind.from_pretrained(source, subfolder=part).save_pretrained(f'{target}/{part}', variant='fp16',\n"
        "        max_shard_size='500KB')\n"
    )
    folder = tmp_path / "c"
    shutil.copytree(TINY, folder)
    for part in ("transformer", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    subprocess.run([sys.executable, "-c", code, str(TINY), str(folder)], check=True, cwd=ROOT, capture_output=True)
    assert len(list((folder / "transformer").glob("*fp16*.safetensors"))) > 1
    image, reasons = drawn(str(folder))
    assert same(image, plain)
    assert reasons["variant"] == "fp16: the only weights there, of transformer, vae"


def test_of_several_the_plain_one_or_the_one_that_is_asked_for(plain: Pixels, tmp_path: Path) -> None:
    folder = with_variant(tmp_path / "c", ["transformer"], "ema", plain=True)
    path = folder / "transformer/diffusion_pytorch_model.ema.safetensors"
    save_file({key: value * 1.01 for key, value in load_file(path).items()}, path)
    image, reasons = drawn(str(folder))
    assert same(image, plain)
    assert "variant" not in reasons
    other, reasons = drawn(str(folder), "--variant", "ema")
    assert not np.array_equal(other, plain)
    assert reasons["variant"] == "ema: asked for, of transformer"


def refused(model: Path, *flags: str) -> str:
    server = Server("--model", str(model), *flags)
    assert server.wait_end() == EXIT_START, server.output
    assert "Traceback" not in server.output
    return server.output


def test_several_without_a_plain_one_are_told_with_the_remedy(tmp_path: Path) -> None:
    folder = with_variant(tmp_path / "c", ["vae"], "fp16", plain=True)
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.ema.safetensors")
    said = refused(folder)
    assert "ema, fp16" in said
    assert "--variant" in said
    assert "--variant: got fp32" in refused(folder, "--variant", "fp32")
    assert "--variant: got bf16" in refused(TINY, "--variant", "bf16")


# --- a hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub({}) as hub:
        yield hub


def test_of_a_hub_only_what_is_read_is_downloaded(plain: Pixels, hub: Hub, tmp_path: Path) -> None:
    folder = with_variant(tmp_path / "c", [*PARTS], "fp16", plain=True)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"large")
    (folder / "whole.safetensors").write_bytes(b"large")
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"large")
    hub.files = files_of(folder)
    image, _ = drawn("org/model", **hub.environment(tmp_path / "home"))
    assert same(image, plain)
    weights = sorted(name for name, _ in hub.served if not name.endswith(".json"))
    assert weights == ["controlnet/diffusion_pytorch_model.safetensors"] + [
        f"{part}/{PARTS[part]}.safetensors" for part in sorted(PARTS)
    ]
    hub.served.clear()
    image, _ = drawn(
        "org/model", **hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1")
    )  # the cache serves without the hub
    assert same(image, plain)
    assert hub.served == []


def test_of_a_hub_with_one_variant_that_is_downloaded(plain: Pixels, hub: Hub, tmp_path: Path) -> None:
    folder = with_variant(tmp_path / "c", [*PARTS], "fp16")
    shard(
        folder,
        "transformer",
        [f"diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)],
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    )
    hub.files = files_of(folder)
    image, reasons = drawn("org/model", **hub.environment(tmp_path / "home"))
    assert same(image, plain)
    assert reasons["variant"] == "fp16: the only weights there, of text_encoder, transformer, vae"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", ""),
        ("model-00001-of-00002.safetensors", ""),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("config.json", None),
        ("model.bin", None),
    ],
)
def test_names_say_the_variant(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


def test_of_another_decoder_or_controlnet_its_part_alone_is_needed() -> None:
    whole = [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/x.safetensors",
    ]
    assert required_files(whole, "vae", None, "x") == whole[1:3]
    alone = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "README.md",
    ]
    assert required_files(alone, "controlnet", None, "x") == alone[:2]
    assert required_files(alone, "controlnet", "fp16", "x") == [alone[0], alone[2]]


# --- a user without a home --------------------------------------------------------------------------------------------

HOMELESS = ["unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-u", "HOME", "-u", "XDG_CACHE_HOME"]
HOMELESS += ["-u", "HF_HOME", "-u", "USER", "-u", "LOGNAME"]


def homeless() -> bool:
    code = "import os, pwd, sys\ntry: pwd.getpwuid(os.getuid())\nexcept KeyError: sys.exit(7)"
    try:
        return subprocess.run([*HOMELESS, sys.executable, "-c", code], check=False, capture_output=True).returncode == 7
    except OSError:
        return False


needs_user = pytest.mark.skipif(not homeless(), reason="needs unshare --user, to be a user that the host does not know")


class Homeless(Server):
    command = HOMELESS


@needs_user
def test_a_user_without_a_home_is_served() -> None:
    server = Homeless("--model", "tiny")
    try:
        url = server.wait_ready()
        assert httpx.post(f"{url}/generate", json=BODY, timeout=60).status_code == 200
    finally:
        server.process.terminate()
        server.wait_end()


@needs_user
@pytest.mark.parametrize(("model", "word"), [("org/model", "HF_HOME"), ("~/model", "HOME")])
def test_a_home_that_is_needed_is_asked_for_by_name(model: str, word: str) -> None:
    server = Homeless("--model", model, HF_HUB_OFFLINE="1")
    assert server.wait_end() == EXIT_START, server.output
    assert f"set {word}" in server.output
    assert "Traceback" not in server.output
    assert not os.path.lexists(ROOT / "~")
