"""A native engine that a CPU built, loaded on a CPU with the kernels' references."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_engines import compile_some, drawn, loaded, spec
from safetensors.torch import load_file, save_file
from small_checkpoint import KERNEL_AUTOENCODER, SMALL_LITE, SMALL_TAESANA, save_decoder

from bench.budget.card import Card
from bench.budget.engine import CAPABILITY, PROCESSORS, Counted, _Trusted, count_request, prompts
from bench.budget.totals import document
from engines.artifacts.manifest import read_manifest
from engines.artifacts.native.compiling import CompileRequest
from engines.artifacts.native.loading import load_native
from engines.artifacts.native.reading import read_weights
from engines.artifacts.native.skeleton import DTYPE, modules_of
from engines.backends.cuda.blocks import FP8_PRODUCTS
from engines.backends.cuda.transformer import CudaTransformer
from engines.build.builder import build
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import ArtifactError
from engines.kernels.op import Ops
from engines.loader import load_engine
from engines.models.dcae import AutoencoderConfig
from engines.models.taesana import TaesanaConfig
from engines.pipeline.native import PRODUCT_SQNR_DB, NativeBackend
from engines.pipeline.text_stage import load_text_stage
from engines.types import Job

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_engine_draws_what_the_checkpoint_draws(ours: Path, for_hopper: Path) -> None:
    engine = loaded(ours, for_hopper)
    for found, expected in zip(drawn(engine), drawn(loaded(ours)), strict=True):
        assert 20 < expected.pixels.std() < 120
        np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (engine.info.backend, engine.info.precision) == ("cuda-graph", "bf16")
    assert "decoder" not in engine.info.reasons
    assert engine.limits.sizes == ((64, 64),)


def test_a_decoder_that_the_kernels_cannot_run_is_kept_as_pytorch_has_it(small_checkpoint: Path, for_ada: Path) -> None:
    engine = loaded(small_checkpoint, for_ada)
    for found, expected in zip(drawn(engine), drawn(loaded(small_checkpoint)), strict=True):
        np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert "multiples of 32 are needed" in engine.info.reasons["decoder"]
    [decoder] = [made for made in read_manifest(for_ada).artifacts if made.module == "decoder"]
    assert "multiples of 32 are needed" in str(decoder.details["reason"])


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("config", [SMALL_TAESANA, SMALL_LITE], ids=["taesana", "lite"])
def test_another_decoder_is_stored_and_a_second_one_runs_beside(
    config: TaesanaConfig | AutoencoderConfig, ours: Path, for_hopper: Path, tmp_path: Path
) -> None:
    decoder = str(save_decoder(tmp_path / "other", config))
    asked = replace(spec(ours, tmp_path / "engine"), decoder=decoder)
    assert build(asked).manifest.decoder == decoder
    expected = drawn(loaded(ours, decoder=decoder))
    for found, image in zip(drawn(loaded(ours, asked.out, decoder=decoder)), expected, strict=True):
        np.testing.assert_array_equal(found.pixels, image.pixels)
    with pytest.raises(ArtifactError, match=rf"built with the decoder {decoder}, and started with full"):
        loaded(ours, asked.out)
    second = loaded(ours, for_hopper, fast_decoder=decoder)
    second.warmup()
    jobs = [Job("a circle", seed=0, width=64, height=64, decoder=name) for name in ("full", "fast")]
    full, fast = (second.generate([job])[0].pixels for job in jobs)
    np.testing.assert_array_equal(fast, expected[0].pixels)
    np.testing.assert_array_equal(full, drawn(loaded(ours, for_hopper))[0].pixels)


@pytest.mark.parametrize("config", [SMALL_TAESANA, SMALL_LITE, KERNEL_AUTOENCODER], ids=["taesana", "lite", "ours"])
def test_an_engine_stores_two_decoders(
    config: TaesanaConfig | AutoencoderConfig, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[CompileRequest] = []
    monkeypatch.setattr(
        "engines.artifacts.native.compiling.compile_kernels", lambda request, _: requests.append(request) or {}
    )
    fast, out = str(save_decoder(tmp_path / "fast", config)), tmp_path / "engine"
    manifest = build(replace(spec(ours, out), fast_decoder=fast)).manifest
    assert (manifest.fast_decoder, requests[0].fast_decoder) == (fast, fast)
    assert [made.module for made in manifest.artifacts][-1] == "fast_decoder"
    assert (out / "fast_decoder-1.safetensors").is_file()
    engine, direct = loaded(ours, out, fast_decoder=fast), loaded(ours, fast_decoder=fast)
    engine.warmup()
    jobs = [Job("a circle", seed=0, width=64, height=64, decoder=name) for name in ("full", "fast")]
    for job in jobs:
        np.testing.assert_array_equal(engine.generate([job])[0].pixels, direct.generate([job])[0].pixels)
    assert ("fast_decoder" in engine.info.reasons) == (config is not KERNEL_AUTOENCODER)
    alone = loaded(ours, out)
    assert alone.limits.decoders == ("full",)
    np.testing.assert_array_equal(drawn(alone)[0].pixels, drawn(loaded(ours))[0].pixels)
    other = str(save_decoder(tmp_path / "other", SMALL_TAESANA if config is SMALL_LITE else SMALL_LITE))
    with pytest.raises(ArtifactError, match=rf"built with the fast decoder {fast}, and started with {other}"):
        loaded(ours, out, fast_decoder=other)
    weights = Path(fast) / "diffusion_pytorch_model.safetensors"
    save_file({key: value * 2 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(ArtifactError, match=rf"fast decoder {fast} of weights \w+, and {fast} has"):
        loaded(ours, out, fast_decoder=fast)


@pytest.mark.slow  # compiles a tenth of the kernels
def test_kernels_of_a_second_decoder_are_compiled(ours: Path, for_hopper: Path, tmp_path: Path) -> None:
    """A second decoder of other widths launches kernels that the first does not."""
    wider = replace(KERNEL_AUTOENCODER, decoder_block_out_channels=(32, 64, 64, 128))
    fast = str(save_decoder(tmp_path / "fast", wider))
    asked = replace(spec(ours, tmp_path / "engine"), fast_decoder=fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.artifacts.native.compiling.compile_kernels", compile_some)
        build(asked)

    def compiled(folder: Path) -> int:
        return len(list(folder.rglob("*.cubin")))

    assert compiled(asked.out) > compiled(for_hopper)


@pytest.mark.usefixtures("not_compiled")
def test_8_bits_come_back_as_a_start_without_an_engine_has_them(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engine"
    build(spec(ours, folder, precision="fp8"))
    checkpoint = open_checkpoint(str(ours))
    direct = NativeBackend(Ops(None), checkpoint.autoencoder)
    modules = modules_of(checkpoint, direct, CPU)
    direct.to_fp8(checkpoint, direct.text(load_text_stage(checkpoint, DTYPE, CPU)), (64, 64), CPU)
    monkeypatch.setattr(NativeBackend, "to_fp8", None)  # no start calibrates again
    native = NativeBackend(Ops(None), checkpoint.autoencoder)
    parts = load_native(folder, read_manifest(folder), checkpoint, CPU, tmp_path, "", native)
    latents, channels = torch.randn(2, 8, 8, 8), checkpoint.transformer.in_channels
    noise, text = torch.randn(2, channels, 8, 8), torch.randn(2, 7, checkpoint.transformer.caption_channels)
    with torch.inference_mode():
        assert torch.equal(parts.decoder(latents)[0], modules["decoder"](latents)[0])
        steps = (torch.full((2,), 0.9), torch.full((2,), 0.45))
        assert torch.equal(parts.transformer(noise, text, *steps), modules["transformer"](noise, text, *steps))
    told = json.loads((folder / "native.json").read_text())
    assert {name: len(rows) for name, rows in told["ranges"].items()} == {"transformer": 2, "decoder": 5}
    assert 20 < told["text"]["sqnr_db"] < 35
    engine = loaded(ours, folder)
    assert engine.info.precision == "fp8"
    for found, exact in zip(drawn(engine), drawn(loaded(ours)), strict=True):
        noise = float(np.square(found.pixels.astype(float) - exact.pixels).mean())
        assert 0 < noise < 255**2 / 10**2.5
    parts_of = {part.module: part for part in read_manifest(folder).artifacts}
    assert {name: part.precision for name, part in parts_of.items()} == {
        "transformer": "fp8", "decoder": "fp8", "encoder": "bf16",
    }  # fmt: skip
    alone = parts_of["transformer"].details["sqnr_db_alone"]
    assert isinstance(alone, dict)
    assert {name: db for name, db in alone.items() if name != "text"} == direct.product_sqnr_db
    assert set(direct.product_sqnr_db) == set(FP8_PRODUCTS)
    bad = {name for name, db in direct.product_sqnr_db.items() if db < PRODUCT_SQNR_DB}
    left = {name for name, seen in zip(FP8_PRODUCTS, direct.ranges["transformer"][0], strict=True) if seen == math.inf}
    assert bad == left < set(FP8_PRODUCTS), direct.product_sqnr_db
    assert alone["text"] == pytest.approx(told["text"]["sqnr_db"], abs=0.1)


def test_a_product_that_alone_is_too_far_stays_in_bf16(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(ours))

    def quantised() -> tuple[NativeBackend, CudaTransformer]:
        native = NativeBackend(Ops(None), checkpoint.autoencoder)
        transformer = modules_of(checkpoint, native, CPU)["transformer"]
        assert isinstance(transformer, CudaTransformer)
        native.to_fp8(checkpoint, native.text(load_text_stage(checkpoint, DTYPE, CPU)), (64, 64), CPU)
        return native, transformer

    found = quantised()[0].product_sqnr_db
    worst = min(found, key=lambda product: found[product])
    monkeypatch.setattr("engines.pipeline.native.PRODUCT_SQNR_DB", sorted(found.values())[1])
    native, transformer = quantised()
    assert native.reasons["fp8"].endswith(f": {worst}, {found[worst]} dB")
    left = {
        product
        for product in FP8_PRODUCTS
        for weights in transformer.blocks._weights
        if getattr(weights, product).scales is None
    }
    assert left == {worst}
    again = NativeBackend(Ops(None), checkpoint.autoencoder)
    modules_of(checkpoint, again, CPU)
    again.quantise(json.loads(json.dumps(native.ranges)))
    assert again.ranges == native.ranges


@pytest.mark.usefixtures("not_compiled")
def test_8_bits_leave_a_decoder_that_pytorch_runs(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    build(spec(small_checkpoint, folder, precision="fp8"))
    precisions = {part.module: part.precision for part in read_manifest(folder).artifacts}
    assert precisions == {"transformer": "fp8", "decoder": "bf16", "encoder": "bf16"}
    for found, exact in zip(drawn(loaded(small_checkpoint, folder)), drawn(loaded(small_checkpoint)), strict=True):
        assert 0 < float(np.square(found.pixels.astype(float) - exact.pixels).mean()) < 255**2 / 10**2


def test_a_request_costs_what_it_does_without_an_engine(
    ours: Path, for_hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bench.budget counts as many launches, bytes, copies and waits, and no more memory."""

    def read_to_meta(files: Sequence[tuple[Path, str]], _: torch.device) -> dict[str, torch.Tensor]:
        return {name: tensor.to(META) for name, tensor in read_weights(files, CPU).items()}

    monkeypatch.setattr("engines.artifacts.native.loading.read_weights", read_to_meta)
    direct = count_request(str(ours), "cuda-graph", (64, 64), 1, 1, 8)
    checkpoint = open_checkpoint(str(ours))
    card = Card("H100", PROCESSORS, CAPABILITY)
    [prompt] = prompts(checkpoint, 8, 1)
    with card.present():
        engine = load_engine(
            checkpoint,
            engine_dir=str(for_hopper),
            device="cuda",
            recorder=card.recorder,
            native=_Trusted(Ops(card.launcher), checkpoint.autoencoder),
        )
        engine.warmup()
        card.clear()
        engine.generate([Job(prompt, seed=0, width=64, height=64)])
    found, expected = document(Counted(card.events, card.memory.peak)), document(direct)
    assert found.pop("peak_bytes") <= expected.pop("peak_bytes")
    assert found == expected
