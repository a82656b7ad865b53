"""clients/comfyui: the node, loaded from its file as ComfyUI loads it, makes the images of /generate."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running_server import GatedEngine, Running, Serve, read_image

from engines.fake import FakeEngine, expected_pixels
from engines.types import Job, Pixels
from server.generation.model_engines import ModelEngines

FILE = Path(__file__).parents[3] / "clients" / "comfyui" / "sana_sprint.py"
NAME = "SanaSprintGenerate"
DRAWING: Pixels = (np.arange(40 * 30 * 3).reshape(40, 30, 3) % 253).astype(np.uint8)


@pytest.fixture(scope="module")
def node() -> Iterator[Any]:
    """As Comfy-Org/ComfyUI nodes.py, load_custom_node, has it for one file: the module is called by its path."""
    name = str(FILE.with_suffix(""))
    spec = importlib.util.spec_from_file_location(name, FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS) == {NAME}
    yield module.NODE_CLASS_MAPPINGS[NAME]
    del sys.modules[name]


def run(node: Any, running: Running, **inputs: Any) -> Pixels:
    """[count, height, width, 3] bytes: called with every required input, at its default unless given."""
    required = {name: kind[1]["default"] for name, kind in node.INPUT_TYPES()["required"].items()}
    (images,) = getattr(node(), node.FUNCTION)(**required | {"server": running.url, "width": 64, "height": 96} | inputs)
    assert (images.dtype, images.ndim) == (torch.float32, 4)
    pixels: Pixels = (images * 255).round().to(torch.uint8).numpy()
    return pixels


def job(seed: int, **fields: Any) -> Job:
    return Job("a blue square", seed=seed, width=64, height=96, **fields)


def tensor(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).float()[None] / 255


def test_images_equal_those_of_generate(node: Any, plain: Running) -> None:
    made = run(node, plain, prompt="a blue square", seed=5, count=2)
    for i, pixels in enumerate(made):
        answer = plain.generate("a blue square", seed=5 + i, width=64, height=96)
        np.testing.assert_array_equal(pixels, read_image(answer.content))
        np.testing.assert_array_equal(pixels, expected_pixels(job(5 + i)))
    assert len(made) == 2
    assert run(node, plain, width=0, height=0).shape == (1, 256, 256, 3)


def test_images_and_strokes_are_sent(node: Any, plain: Running) -> None:
    inputs = {"prompt": "a blue square", "seed": 5, "steps": 2, "guidance": 4.0}
    made = run(node, plain, **inputs, image=tensor(DRAWING), strength=0.25)
    wanted = job(5, steps=2, guidance_scale=4.0, image=DRAWING, strength=0.25)
    np.testing.assert_array_equal(made[0], expected_pixels(wanted))
    drawn = run(node, plain, **inputs, control_image=tensor(DRAWING), control_scale=0.5)
    wanted = job(5, steps=2, guidance_scale=4.0, control_image=DRAWING, control_scale=0.5)
    np.testing.assert_array_equal(drawn[0], expected_pixels(wanted))


def test_the_decoder_is_sent(node: Any, serve: Serve) -> None:
    running = serve(FakeEngine(fast_decoder="taesana"))
    for decoder in ("full", "fast"):
        made = run(node, running, prompt="a blue square", seed=5, decoder=decoder)
        np.testing.assert_array_equal(made[0], expected_pixels(job(5, decoder=decoder)))


def test_a_server_of_several_models_is_told_which(node: Any, serve: Serve) -> None:
    engines = {name: FakeEngine(checkpoint=name) for name in ("one", "two")}
    running = serve(ModelEngines(engines), model="one,two")
    for model, made_by in (("", "one"), ("two", "two")):
        [pixels] = run(node, running, prompt="a blue square", seed=5, model=model)
        np.testing.assert_array_equal(pixels, expected_pixels(job(5), made_by))


def test_what_the_server_says_is_what_the_node_says(node: Any, plain: Running) -> None:
    with pytest.raises(RuntimeError, match=r"/generate: 422 width x height: got 96x100, which"):
        run(node, plain, width=96, height=100)
    with pytest.raises(RuntimeError, match="is a sana-sprint-server running there"):
        run(node, plain, server="http://127.0.0.1:9")


def test_the_bounds_are_those_of_the_server(node: Any, plain: Running) -> None:
    """The server accepts every value that ComfyUI offers."""
    schema = plain.client.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]
    inputs = {name: kind[1] for group in node.INPUT_TYPES().values() for name, kind in group.items()}
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "count": "num_images"}
    for name in ("steps", "guidance", "count", "strength", "control_scale"):
        field = schema[names.get(name, name)]
        assert (inputs[name]["min"], inputs[name]["max"]) == (field["minimum"], field["maximum"]), name
        assert inputs[name]["default"] == field["default"], name
    assert run(node, plain, seed=inputs["seed"]["max"], count=8).shape[0] == 8


def test_a_key_is_read_from_the_environment(
    node: Any, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("right\n")
    running = serve(api_key_file=str(tmp_path / "keys"))
    with pytest.raises(RuntimeError, match="401"):
        run(node, running)
    monkeypatch.setenv("SANA_SPRINT_API_KEY", "right")
    assert run(node, running).shape == (1, 96, 64, 3)


def test_a_full_server_is_asked_again(node: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GatedEngine()
    running = serve(engine, max_queue=1, max_batch=1)
    engine.gate.clear()
    waiting = [running.submit_generate("first")]
    engine.wait_for_batch()
    waiting.append(running.submit_generate("second"))
    running.wait_for_queued(1)  # there is no place for a third
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        """Instead of a pause, what it is for: places become free."""
        pauses.append(seconds)
        engine.gate.set()
        for one in waiting:
            one.result()

    module = sys.modules[node.__module__]
    monkeypatch.setattr(module.time, "sleep", pause)  # type: ignore[attr-defined]
    assert run(node, running).shape[0] == 1
    assert len(pauses) == 1
    assert pauses[0] >= 1
