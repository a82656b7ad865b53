"""The whole engine through captured graphs, recorded without a device, and computations that can be captured."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_engines import loaded
from PIL import Image
from random_modules import SHAPE, random_module, random_transformer
from safetensors.torch import save_file
from small_checkpoint import randomise_weights, save_checkpoint, with_settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.backends.cuda.graphs import EagerReplay, GraphKey, Replay
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import BackendError, CaptureError, OutOfMemoryError
from engines.kernels.op import Op, Ops
from engines.loader import load_engine
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.pipeline.denoise_decode import Decode, Denoise, input_specs, latent_spec
from engines.pipeline.engine import SprintEngine
from engines.pipeline.native import NativeBackend
from engines.types import Engine, Job, Pixels, RawImage

SETTINGS = '{"default_size": [64, 64], "sizes": [[64, 64], [64, 32]], "max_prompt_tokens": 40}'


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_settings(folder, tmp_path_factory.mktemp("graphs") / "sprint", SETTINGS))


@pytest.fixture(scope="module")
def captured(model: str) -> Iterator[SprintEngine]:
    engine = load_engine(model, backend="cuda-graph", max_batch=2, recorder=EagerReplay(), device="cpu")
    assert isinstance(engine, SprintEngine)
    engine.warmup()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def eager(model: str) -> Engine:
    return load_engine(model, max_batch=2, device="cpu")


def job(seed: int, **changes: Any) -> Job:
    words = ("a red circle", "three green triangles on a white background")
    return replace(Job(words[seed % 2], seed=seed, width=64, height=64, guidance_scale=4 + seed), **changes)


def assert_equal(images: list[RawImage], expected: list[RawImage]) -> None:
    for one, other in zip(images, expected, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max() <= 1
        assert one.pixels.std() > 10


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_images_of_graphs_equal_eager(count: int, steps: int, captured: SprintEngine, eager: Engine) -> None:
    jobs = [job(seed, steps=steps) for seed in range(count)]
    images = captured.generate(jobs)
    assert_equal(images, eager.generate(jobs))
    assert {image.bucket for image in images} == {count}
    assert not any(image.uncaptured for image in images)
    assert min(images[0].stages.denoise, images[0].stages.decode) > 0, "each stage has its own time"


def test_a_png_is_the_image(captured: SprintEngine, eager: Engine) -> None:
    """The engine encodes PNG if it has graphs; otherwise it leaves that to the server."""
    jobs = [job(seed, png=True) for seed in range(2)]
    pixels = captured.generate([job(seed) for seed in range(2)])
    for images, expected in zip(captured.generate(jobs), pixels, strict=True):
        assert images.file is not None
        assert images.pixels.size == 0
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images.file))), expected.pixels)
    assert [image.file for image in eager.generate(jobs)] == [None, None]


def test_image_to_image_runs_in_the_same_graphs(captured: SprintEngine, eager: Engine) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    jobs = [job(seed, image=photo, strength=0.4, steps=2) for seed in range(2)]
    images = captured.generate(jobs)
    assert_equal(images, eager.generate(jobs))
    assert not images[0].uncaptured


def test_everything_is_captured_before_the_first_request_and_nothing_later(captured: SprintEngine) -> None:
    assert captured._runners is not None
    runner = captured._runners.plain
    assert runner.ready
    assert len(runner.capture_order) == 2 * 2 * 4
    assert runner.capture_order[0] == GraphKey(2, 8, 8, 4)
    assert captured._runners.decode.capture_order == (GraphKey(1, 8, 8, 1), GraphKey(1, 4, 8, 1))
    assert captured.info.backend == "cuda-graph"
    assert captured.info.reasons["graphs"] == (
        "16 are captured before the first request: batches 1, 2, 2 sizes, steps 1, 2, 3, 4"
    )


def test_the_first_images_are_one_of_each_kind_and_one_of_each_batch(captured: SprintEngine) -> None:
    """A second batch of files would show nothing new: images are decoded and encoded one by one."""
    made = list[tuple[int, int, bool]]()

    def note(jobs: Sequence[Job]) -> list[RawImage]:
        made.append((jobs[0].height, len(jobs), jobs[0].png))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "generate", note)
        captured._make_first_images()
    assert made == [(side, *kind) for side in (64, 32) for kind in ((1, False), (2, False), (1, True))]


def test_an_unseen_shape_runs_as_it_is_and_says_so(folder: Path) -> None:
    engine = load_engine(str(folder), backend="cuda-graph", max_batch=1, recorder=EagerReplay(), device="cpu")
    assert isinstance(engine, SprintEngine)
    assert engine._runners is not None
    runner = engine._runners.plain
    [image] = engine.generate([job(0)])  # graphs are for 1024x1024, and none is captured
    assert image.uncaptured
    assert runner.uncaptured == {GraphKey(1, 8, 8, 1): 1}
    assert_equal([image], load_engine(str(folder)).generate([job(0)]))


def test_drawings_have_graphs_of_their_own(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "sprint")
    (model / "sprint.json").write_text('{"default_size": [64, 64], "max_prompt_tokens": 40}')
    add_controlnet(model)
    drawing = np.zeros((64, 64, 3), np.uint8)
    drawing[20:40, 20:40] = 255
    jobs = [job(0, control_image=drawing, control_scale=0.5, steps=2)]
    graphs = load_engine(str(model), backend="cuda-graph", max_batch=1, recorder=EagerReplay(), device="cpu")
    assert isinstance(graphs, SprintEngine)
    graphs.warmup()
    images = graphs.generate(jobs)
    assert not images[0].uncaptured
    assert_equal(images, load_engine(str(model)).generate(jobs))
    assert np.abs(images[0].pixels.astype(int) - graphs.generate([job(0, steps=2)])[0].pixels).max() > 1


def add_controlnet(model: Path) -> None:
    transformer = open_checkpoint(str(model)).load_transformer(torch.float32, torch.device("cpu"))
    branch = randomise_weights(ControlNet.of(transformer, 1))
    assert isinstance(branch, ControlNet)
    (model / "controlnet").mkdir()
    (model / "controlnet" / "config.json").write_text(json.dumps(branch.config.to_dict()))
    save_file(branch.state_dict(), model / "controlnet" / "diffusion_pytorch_model.safetensors")


def test_without_a_gpu_graphs_are_refused_by_name(model: str) -> None:
    with pytest.raises(BackendError, match="cuda-graph needs an NVIDIA GPU, and the device is cpu; use eager"):
        load_engine(model, backend="cuda-graph", device="cpu")


class NoRoom(EagerReplay):
    def warm(self, _: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_no_room_for_the_graphs_is_told(model: str) -> None:
    engine = load_engine(model, backend="cuda-graph", recorder=NoRoom(), device="cpu")
    with pytest.raises(OutOfMemoryError, match="no memory to capture the CUDA graphs"):
        engine.warmup()


class Refusing(EagerReplay):
    """Refuses graphs whose first output has this type and number of dimensions."""

    def __init__(self, dtype: torch.dtype, dimensions: int):
        self._kind = dtype, dimensions

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        replay, outputs = super().record(launch)
        if (outputs[0].dtype, outputs[0].ndim) == self._kind:
            raise CaptureError("not captured: RuntimeError: illegal here")
        return replay, outputs


@pytest.mark.parametrize(
    ("name", "dtype", "dimensions"),
    [("denoise", torch.float32, 4), ("decode", torch.uint8, 4), ("PNG", torch.int32, 2), ("text", torch.bfloat16, 3)],
    ids=["denoise", "decode", "PNG", "text"],
)
def test_a_graph_that_cannot_be_captured_does_not_end_the_start(
    name: str, dtype: torch.dtype, dimensions: int, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, sound = (
        loaded(Path(model), max_batch=2, recorder=recorder) for recorder in (Refusing(dtype, dimensions), EagerReplay())
    )
    jobs = [job(seed, png=True, steps=2) for seed in range(2)]
    expected = [read(image) for image in sound.generate(jobs)]
    engine.warmup()
    engine.warmup()  # as an engine that was timed beside another one
    graph = f"graph of {name}"
    assert engine.info.replaced_kernels == {graph: "not captured: RuntimeError: illegal here"}
    assert engine.info.reasons["graphs"].endswith(f"steps 1, 2, 3, 4; without a graph: {name}")
    told = [record.getMessage() for record in caplog.records if record.name == "engines.pipeline"]
    assert told == [f"{graph}: not captured: RuntimeError: illegal here; images are right, and slower"]
    images = engine.generate(jobs)
    for image, want in zip(images, expected, strict=True):
        assert np.abs(read(image).astype(int) - want).max() <= 1
        assert image.uncaptured is (name == "denoise")
        assert (image.file is None) is (name == "PNG"), "the server encodes it"


def read(image: RawImage) -> Pixels:
    return image.pixels if image.file is None else np.asarray(Image.open(io.BytesIO(image.file)))


class Noting(Ops):
    """Notes the operations that a comparison reaches."""

    def __init__(self) -> None:
        super().__init__(None)
        self.compared = set[str]()

    def __call__(self, op: Op, *args: Any) -> Any:
        if self._checked is not None:
            self.compared.add(op.name)
        return super().__call__(op, *args)


def test_a_start_compares_the_kernels_of_long_prompts_too(model: str) -> None:
    ops = Noting()
    native = NativeBackend(ops, open_checkpoint(model).autoencoder)
    engine = load_engine(
        model, native=native, precision="bf16", backend="cuda-graph", max_batch=1, device="cpu", recorder=EagerReplay()
    )
    assert native._text is not None
    native._text.to_fp8()
    engine.warmup()
    assert {"skinny_product", "gelu_gate", "widened_weight", "residual_norm"} <= ops.compared


class NoHost(TorchDispatchMode):
    """Rejects what a CUDA graph cannot hold: values that move between host and device, and shapes from values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "item"}, name
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, *(kwargs or {}).values(), out) if isinstance(value, Tensor)]
        # A CPU tensor without dimensions is a kernel argument; anything else would be a copy.
        devices = {value.device.type for value in tensors if value.ndim}
        assert len(devices) <= 1, f"{name} moves values between {devices}"
        return out


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("drawing", [False, True])
def test_a_chain_never_touches_the_host(drawing: bool, steps: int) -> None:
    """The meta device stands for the card: a wait for it or a copy to it fails or is detected."""
    dtype, key = torch.bfloat16, GraphKey(2, SHAPE.height, SHAPE.width, steps)
    transformer = random_transformer(dtype=dtype)
    module = ControlledTransformer(transformer, ControlNet.of(transformer, 1).to(dtype)) if drawing else transformer
    denoise, decode = Denoise(module.to("meta"), dtype), Decode(random_module("decoder", dtype).to("meta"))
    specs = {**input_specs(32, SHAPE.tokens, 128, dtype, drawing=drawing), **latent_spec(32)}
    inputs = {name: torch.empty(spec.shape(key), dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    with torch.no_grad(), NoHost():  # inference mode would hide the parts of composite operators
        [latent] = denoise(inputs)
        pixels, finite = decode({"latent": latent})
    assert (pixels.shape, pixels.dtype, pixels.device.type) == ((2, 128, 256, 3), torch.uint8, "meta")
    assert finite.shape == (2,)


@pytest.mark.parametrize(
    "careless",
    [
        lambda x, *_: x * torch.tensor([2.0]).to(x.device),
        lambda x, *_: x * float(x.sum()),
        lambda x, *_: x[x > 0],
    ],
    ids=["made on the host", "read by the host", "shape from a value"],
)
def test_a_careless_chain_is_seen(careless: Any) -> None:
    key = GraphKey(1, 4, 4, 1)
    specs = input_specs(32, 4, 8, torch.float32, drawing=False)
    inputs = {name: torch.empty(spec.shape(key), dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    with NoHost(), pytest.raises((AssertionError, RuntimeError)):
        Denoise(careless, torch.float32)(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda-graph", "compiled"])
def test_graphs_on_the_card_equal_eager_there(backend: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or eager itself is not fp32
    graphs = load_engine(model, backend=backend, max_batch=2, precision="fp32")
    assert isinstance(graphs, SprintEngine)
    graphs.warmup()
    eager = load_engine(model, backend="eager", max_batch=2, precision="fp32")
    for steps in (1, 2, 4):
        jobs = [job(seed, steps=steps) for seed in range(2)]
        images = graphs.generate(jobs)
        assert not images[0].uncaptured
        assert_equal(images, eager.generate(jobs))
        assert min(images[0].stages.denoise, images[0].stages.decode) > 0
