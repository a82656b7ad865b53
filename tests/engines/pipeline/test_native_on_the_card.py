"""The kernels on a GPU: each equals its reference there, and so does the whole engine."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import randomise_weights

from engines.backends.cuda.decoder import CudaDecoder
from engines.backends.cuda.graphs import CudaGraphCapture
from engines.backends.cuda.text import CudaTextEncoder
from engines.backends.cuda.transformer import CudaTransformer
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.loader import load_engine
from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.pixels import PixelDecoder
from engines.models.text_encoder import TextEncoder, Tokens
from engines.models.transformer import SPRINT_0_6B, SprintTransformer
from engines.pipeline.download import CudaDownloader, jpeg_on_card
from engines.pipeline.png import PngEncoder
from engines.types import Job

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops(Launcher.of(torch.device("cuda", 0)))


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 8), (4, 12)], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_decoder(fp8: bool, size: tuple[int, int], ops: Ops) -> None:
    made = randomise_weights(Autoencoder(AutoencoderConfig()))
    assert isinstance(made, Autoencoder)
    latent = torch.randn(2, 32, *size, device="cuda")
    expected, _ = PixelDecoder(made.to("cuda"))(latent)
    decoder = CudaDecoder(PixelDecoder(made.to(torch.bfloat16)), ops)
    if fp8:
        decoder.calibrate(latent)
        decoder.to_fp8()
    ops.compare(lambda: decoder(latent))
    assert ops.replaced == {}
    pixels, finite = decoder(latent)
    assert finite.tolist() == [True, True]
    assert sqnr_db(expected, pixels) > 30
    again, _ = decoder(latent[1:])
    assert torch.equal(again[0], pixels[1]), "an image depends on its batch"


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_transformer(fp8: bool, batch: int, ops: Ops) -> None:
    module = randomise_weights(SprintTransformer(replace(SPRINT_0_6B, num_layers=2))).to("cuda")
    latent, text = torch.randn(batch, 32, 16, 24, device="cuda"), torch.randn(batch, 40, 2304, device="cuda")
    mask = torch.arange(40, device="cuda") < torch.tensor([7, 40, 22][:batch], device="cuda")[:, None]
    time, guidance = torch.full((batch,), 0.9, device="cuda"), torch.full((batch,), 0.45, device="cuda")
    expected = module(latent, text, time, guidance, mask)
    fast = CudaTransformer(module.to(torch.bfloat16), ops)
    if fp8:
        fast.blocks.calibrates = True
        fast(latent, text, time, guidance, mask)
        fast.blocks.calibrates = False
        fast.to_fp8()
    ops.compare(lambda: fast(latent, text, time, guidance, mask))
    assert ops.replaced == {}
    assert sqnr_db(expected, fast(latent, text, time, guidance, mask)) > (24 if fp8 else 33)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_text(fp8: bool, ops: Ops) -> None:
    body = randomise_weights(GemmaBody(GemmaConfig(num_hidden_layers=2, vocab_size=500))).to("cuda", torch.bfloat16)
    assert isinstance(body, GemmaBody)
    encoder = TextEncoder(body, range(3, 210))
    prompts = [Tokens((*encoder.prefix, *range(300, 300 + count)), len(encoder.prefix) - 3) for count in (5, 20, 90)]
    expected = encoder.encode(prompts)
    fast = CudaTextEncoder(encoder, ops)
    if fp8:
        fast.to_fp8()
    ops.compare(lambda: fast.encode(prompts))
    assert ops.replaced == {}
    fast.capture(CudaGraphCapture())
    fast.uncaptured.clear()
    for want, got in zip(expected, fast.encode(prompts), strict=True):
        assert sqnr_db(want, got) > (22 if fp8 else 30)
    assert not fast.uncaptured


@torch.inference_mode()
def test_an_image_comes_whole_and_as_a_file() -> None:
    ramp = torch.arange(64, dtype=torch.uint8, device="cuda")
    pixels = torch.stack([ramp.repeat(48, 1), ramp.repeat(48, 1) * 2, ramp.repeat(48, 1) * 3], dim=2)
    card = CudaDownloader(jpeg_on_card())
    finite, job = torch.tensor(True, device="cuda"), Job("", seed=0, width=64, height=48)
    whole = {"pixels": pixels, "finite": finite}
    got = card.start(whole, job).wait()
    np.testing.assert_array_equal(got.pixels, pixels.cpu().numpy())
    assert got.finite
    words, facts = PngEncoder(pixels.device)({"pixels": pixels[None]})
    lossless = card.start({"words": words[0], "facts": facts[0], "finite": finite}, job).wait()
    assert lossless.file is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(lossless.file))), pixels.cpu().numpy())
    if card.jpeg is not None:
        file = card.start(whole, replace(job, jpeg_quality=90)).wait()
        assert file.file is not None
        read = np.asarray(Image.open(io.BytesIO(file.file))).astype(int)
        assert abs(read - pixels.cpu().numpy().astype(int)).mean() < 4


@torch.inference_mode()
def test_a_jpeg_waits_for_its_image_whoever_called_the_encoder_first() -> None:
    """torchvision's one encoder knows the stream of its first caller, at most."""
    if jpeg_on_card() is None:
        pytest.skip("torchvision is not installed")
    downloaders = [CudaDownloader(jpeg_on_card()) for _ in range(2)]
    busy, job = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda"), Job("", 0, 512, 512, jpeg_quality=90)
    for number in range(4):
        pixels = torch.zeros(512, 512, 3, dtype=torch.uint8, device="cuda")
        for _ in range(50):  # some 70 ms before the image
            torch.mm(busy, busy)
        pixels.fill_(50 * (number + 1))
        output = {"pixels": pixels, "finite": torch.tensor(True, device="cuda")}
        file = downloaders[number % 2].start(output, job).wait().file
        assert file is not None
        assert abs(np.asarray(Image.open(io.BytesIO(file))).astype(int) - 50 * (number + 1)).max() <= 2


def test_tiny_draws_the_same_as_on_a_cpu() -> None:
    """Runs the shipped checkpoint: PyTorch runs its decoder, our kernels text and transformer."""
    exact, fast = load_engine("tiny", device="cpu"), load_engine("tiny", max_batch=2, device="cuda")
    fast.warmup()
    assert fast.info.reasons["kernels"] == "all equal their references"
    width, height = fast.limits.default_size
    for steps in (1, 2):
        jobs = [Job(prompt, 3, width, height, steps) for prompt in ("a red circle", "three green triangles")]
        for one, other in zip(exact.generate(jobs), fast.generate(jobs), strict=True):
            assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).mean() < 3
            assert not other.uncaptured


def test_the_whole_path_leaves_in_order() -> None:
    fast = load_engine("tiny", max_batch=4, device="cuda")
    fast.warmup()
    width, height = fast.limits.default_size
    told: list[int] = []
    jobs = [
        Job("a red circle", seed, width, height, jpeg_quality=90 if seed % 2 else None, png=not seed)
        for seed in range(3)
    ]
    images = fast.generate(jobs, lambda index, _: told.append(index))
    assert told == [0, 1, 2]
    assert [image.bucket for image in images] == [4, 4, 4]
