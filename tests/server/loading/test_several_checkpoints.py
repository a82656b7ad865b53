"""Two checkpoints in one server: every image equals that of its model alone, and the text encoder is in memory once."""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from program import Server, serving
from running_server import PATIENCE_S, Serve
from small_checkpoint import changed_copy

from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.fake import expected_pixels
from engines.loader import load_engine
from engines.pipeline.engine import SprintEngine
from engines.types import AdapterOption, Job, RawImage, StageSeconds
from server.errors import EXIT_SETTINGS
from server.generation.image_codec import encoder
from server.generation.model_engines import ModelEngines
from server.loading.engine_loader import engine_source
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "models/tiny"
DIAMOND = ROOT / "models/lora/diamond.safetensors"
PROMPTS = ("a red circle", "a blue square on a white background", "three green triangles", "a purple diamond")
SIDE = 64


class Order(NamedTuple):
    model: str
    prompt: str
    seed: int

    @property
    def job(self) -> Job:
        return Job(self.prompt, self.seed, SIDE, SIDE)

    @property
    def body(self) -> dict[str, object]:
        return {**self._asdict(), "width": SIDE, "height": SIDE}


def orders(count: int, models: Sequence[str], distinct: int, seed: int = 0) -> list[Order]:
    rng = random.Random(seed)
    return [Order(rng.choice(models), rng.choice(PROMPTS), rng.randrange(distinct)) for _ in range(count)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_copy(TINY, tmp_path_factory.mktemp("models") / "other")


def alone(checkpoints: Mapping[str, Path], wanted: Sequence[Order]) -> dict[Order, bytes]:
    """Returns the PNG file of each order by an engine that holds its checkpoint alone."""
    encode = encoder("png", 90, base64=False)
    engines = {name: load_engine(str(path), backend="eager", device="cpu") for name, path in checkpoints.items()}
    return {order: encode(engines[order.model].generate([order.job])[0]) for order in set(wanted)}


def send_all(url: str, wanted: Sequence[Order], concurrency: int = 8) -> list[bytes]:
    """Returns the files that a server answers with; each request must get one."""
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client, ThreadPoolExecutor(concurrency) as threads:
        answers = list(threads.map(lambda order: client.post("/generate", json=order.body), wanted))
    assert {answer.status_code for answer in answers} == {200}
    return [answer.content for answer in answers]


def loaded(**options: Any) -> ModelEngines:
    engine = engine_source(Settings(device="cpu", backend="eager", **options)).load(lambda: None)
    assert isinstance(engine, ModelEngines)
    return engine


def tensors(engine: object) -> dict[str, torch.Tensor]:
    assert isinstance(engine, SprintEngine)
    body = engine._modules.text.encoder.body  # type: ignore[attr-defined]  # of the eager backend
    return dict(body.named_parameters())


def test_two_hundred_mixed_requests_equal_each_model_alone(serve: Serve, other: Path) -> None:
    models = {"tiny": TINY, "other": other}
    wanted = orders(200, tuple(models), distinct=3)
    expected = alone(models, wanted)
    for prompt in PROMPTS:  # the models differ, so that a wrong one cannot pass
        files = {expected[order] for order in expected if (order.prompt, order.seed) == (prompt, 0)}
        assert len(files) == 2
    running = serve(loaded(model=f"tiny,other={other}"), model=f"tiny,other={other}", max_batch=1)
    answers = send_all(running.url, wanted)
    wrong = [order for order, content in zip(wanted, answers, strict=True) if content != expected[order]]
    assert wrong == []
    images = [
        running.metric("sana_sprint_images_total", width="64", height="64", steps="1", model=name) for name in models
    ]
    assert images == [sum(order.model == name for order in wanted) for name in models]


def test_equal_text_encoders_are_one(other: Path) -> None:
    """Equal by content: the second checkpoint's files lie elsewhere."""
    engine = loaded(model=f"tiny,other={other}")
    first, second = (tensors(one) for one in engine.engines.values())
    assert {name: tensor.data_ptr() for name, tensor in first.items()} == {
        name: tensor.data_ptr() for name, tensor in second.items()
    }
    [image] = engine.generate([Job("a red circle", 7, SIDE, SIDE, model="tiny")])
    [again] = engine.generate([Job("a red circle", 7, SIDE, SIDE, model="other")])
    assert (image.prompt_cached, again.prompt_cached) == (False, True)


def test_other_text_encoders_stay_apart(other: Path, tmp_path: Path) -> None:
    changed = changed_copy(other, tmp_path / "changed")
    path = changed / "text_encoder/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    engine = loaded(model=f"tiny,changed={changed}")
    first, second = (tensors(one) for one in engine.engines.values())
    assert {tensor.data_ptr() for tensor in first.values()}.isdisjoint(tensor.data_ptr() for tensor in second.values())


def test_a_lora_belongs_to_one_of_two(serve: Serve, other: Path) -> None:
    settings = {"model": f"tiny,other={other}", "lora": (AdapterOption.parse(f"other:diamond={DIAMOND}"),)}
    running = serve(loaded(**settings), **settings)
    listed = [entry["id"] for entry in running.client.get("/v1/models").json()["data"]]
    assert listed == ["tiny", "other", "other:diamond"]
    look = {"prompt": "a red diamond", "seed": 3, "width": SIDE, "height": SIDE, "lora": {"diamond": 1}}
    plain = running.client.post("/generate", json=look | {"model": "other", "lora": None})
    adapted = running.client.post("/generate", json=look | {"model": "other"})
    alone = load_engine(str(other), backend="eager", device="cpu", lora=[AdapterOption("diamond", str(DIAMOND))])
    [expected] = alone.generate([Job("a red diamond", 3, SIDE, SIDE, lora=(("diamond", 1.0),))])
    assert adapted.content == encoder("png", 90, base64=False)(expected)
    assert adapted.content != plain.content
    refused = running.client.post("/generate", json=look)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "lora")


@pytest.mark.parametrize("flags", [["--workers", "1"], ["--workers", "2"]])
def test_as_a_process_with_one_worker_and_two(flags: list[str]) -> None:
    wanted = orders(200, ("one", "two"), distinct=50)
    encode = encoder("png", 90, base64=False)
    with serving("--backend", "fake", "--model", "one", "--model", "two=x", "--max-queue", "512", *flags) as url:
        answers = send_all(url, wanted, concurrency=16)
        text = httpx.get(f"{url}/metrics").text

    def file_of(order: Order) -> bytes:
        pixels = expected_pixels(order.job, order.model)
        return encode(RawImage(pixels, StageSeconds(0, 0, 0), 1))

    assert [order for order, content in zip(wanted, answers, strict=True) if content != file_of(order)] == []
    assert 'model="two"' in text


def test_memory_that_cannot_fit_ends_the_process_in_one_line() -> None:
    flags = [word for seed in range(40) for word in ("--model", f"random:sprint-1.6b:{seed}")]
    server = Server("--device", "cpu", "--log-format", "json", *flags)
    assert server.wait_end() == EXIT_SETTINGS
    lines = [line for line in server.output.splitlines() if "cannot start" in line]
    assert len(lines) == 1
    assert "--model: random:sprint-1.6b:0, " in lines[0]
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_an_engine_belongs_to_one_of_two(serve: Serve, other: Path, tmp_path: Path) -> None:
    """Built engines run the sizes and batches of their build; the other model runs any."""
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    pytest.importorskip("onnx", reason="the extra 'build' is not installed")
    build(BuildSpec("tiny", "cpu", "fp32", tmp_path / "built", sizes=((SIDE, SIDE),), batches=(1, 2)))
    options = {"model": f"tiny,other={other}", "engine": f"tiny={tmp_path / 'built'}", "device": "cpu"}
    engine = engine_source(Settings(**options)).load(lambda: None)  # type: ignore[arg-type]  # of texts
    running = serve(engine, model=options["model"])
    models = running.client.get("/v1/info").json()["models"]
    assert [(one["backend"], one["max_batch"], one["sizes"]) for one in models.values()] == [
        ("openvino", 2, [[SIDE, SIDE]]),
        ("eager", 8, None),
    ]
    assert running.generate(model="other", width=96).status_code == 200
    assert running.generate(model="tiny", width=96).status_code == 422
    assert running.generate(model="tiny", num_images=5).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_two_thousand_mixed_requests(other: Path, workers: int) -> None:
    models = {"tiny": TINY, "other": other}
    wanted = orders(2000, tuple(models), distinct=25)
    expected = alone(models, wanted)
    flags = ("--model", "tiny", "--model", f"other={other}", "--backend", "eager", "--device", "cpu")
    with serving(*flags, "--max-batch", "1", "--max-queue", "512", "--workers", str(workers)) as url:
        answers = send_all(url, wanted)
    wrong = [order for order, content in zip(wanted, answers, strict=True) if content != expected[order]]
    print(f"{len(answers)} requests, {len(expected)} distinct, {len(wrong)} wrong, {workers} workers")
    assert wrong == []
