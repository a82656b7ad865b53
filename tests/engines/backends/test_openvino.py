"""OpenVINO's graphs equal the torch modules within the gates."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from random_modules import SHAPE, random_module
from torch import Tensor

from engines.backends import openvino as backend
from engines.backends.adapters import DecoderAdapter, EncoderAdapter, TransformerAdapter, only_built_sizes
from engines.backends.base import ModuleName
from engines.backends.openvino import CpuPrecision, OpenVinoGraph, check_cpu, convert, has_bf16
from engines.backends.parity import GATES, difference
from engines.build.example_inputs import example_inputs
from engines.build.onnx_export import export_onnx
from engines.build.targets import resolve
from engines.device.hardware import Machine
from engines.errors import ArtifactError, BackendError

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")

LATENT, IMAGE = (SHAPE.height, SHAPE.width), SHAPE.pixels


class Converted(NamedTuple):
    folder: Path

    def graph(
        self, name: ModuleName, precision: CpuPrecision = "fp32", buckets: tuple[int, ...] = (1, 2)
    ) -> OpenVinoGraph:
        return OpenVinoGraph(self.folder / f"{name}.xml", precision, buckets, self.folder / "cache")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("converted")
    for name in ("transformer", "decoder", "encoder"):
        graph = folder / f"{name}.onnx"
        export_onnx(random_module(name), name, example_inputs(name, SHAPE, 2, torch.float32), graph)
        assert convert(graph, folder / name) == [folder / f"{name}.xml", folder / f"{name}.bin"]
        graph.unlink()
    return Converted(folder)


def adapter(name: ModuleName, graph: OpenVinoGraph) -> Callable[..., Tensor]:
    adapters: dict[ModuleName, Callable[..., Tensor]] = {
        "transformer": TransformerAdapter(only_built_sizes({LATENT: graph}), SHAPE.tokens),
        "decoder": lambda latent: DecoderAdapter(only_built_sizes({LATENT: graph}))(latent)[0],
        "encoder": EncoderAdapter(only_built_sizes({IMAGE: graph})),
    }
    return adapters[name]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("name", ["transformer", "decoder", "encoder"])
def test_drop_ins_keep_the_gate(name: ModuleName, precision: CpuPrecision, converted: Converted) -> None:
    module, run = random_module(name), adapter(name, converted.graph(name, precision, (1, 4)))
    for batch in (1, 3):
        inputs = example_inputs(name, SHAPE, batch, torch.float32)
        expected = module(**inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        GATES[precision].check(name, difference(expected, run(**inputs)))


def test_text_of_any_length_and_no_mask_equal_the_module(converted: Converted) -> None:
    run = adapter("transformer", converted.graph("transformer"))
    inputs = example_inputs("transformer", SHAPE, 2, torch.float32)
    del inputs["text_mask"]
    for length in (1, 5, SHAPE.tokens):
        shorter = {**inputs, "text": inputs["text"][:, :length]}
        distance = difference(random_module("transformer")(**shorter), run(**shorter))
        GATES["fp32"].check("transformer", distance)


def test_results_are_the_callers_own(converted: Converted) -> None:
    run = adapter("decoder", converted.graph("decoder"))
    first, second = (example_inputs("decoder", SHAPE, 1, torch.float32, seed) for seed in (0, 1))
    cached = run(**first)
    before = cached.clone()
    run(**second)
    assert torch.equal(cached, before)


def test_a_row_does_not_depend_on_what_fills_its_bucket(converted: Converted) -> None:
    run = adapter("transformer", converted.graph("transformer", buckets=(4,)))
    inputs = example_inputs("transformer", SHAPE, 3, torch.float32)
    alone = run(**{key: value[:1] for key, value in inputs.items()})
    assert torch.equal(run(**inputs)[:1], alone)


def test_compiled_models_are_kept_and_a_damaged_one_costs_only_time(converted: Converted) -> None:
    cache = converted.folder / "cache"
    inputs = example_inputs("decoder", SHAPE, 1, torch.float32)
    expected = adapter("decoder", converted.graph("decoder", buckets=(1,)))(**inputs)
    cached = sorted(cache.rglob("*.blob"))
    assert cached
    for blob in cached:
        os.truncate(blob, blob.stat().st_size // 2)
    assert torch.equal(adapter("decoder", converted.graph("decoder", buckets=(1,)))(**inputs), expected)


def test_what_came_out_of_the_cache_is_told(converted: Converted, tmp_path: Path) -> None:
    def opened(*buckets: int) -> OpenVinoGraph:
        return OpenVinoGraph(converted.folder / "decoder.xml", "fp32", buckets, tmp_path)

    assert opened(1, 2).from_cache == ()
    assert opened(1, 2, 4).from_cache == (1, 2)


class Recording:
    """Compiles nothing; records the cache folders."""

    def __init__(self) -> None:
        self.capabilities = ["FP32", "BF16"]
        self.caches: list[str] = []

    def Core(self) -> "Recording":  # noqa: N802  # OpenVINO's name
        return self

    __version__ = "1"

    def get_property(self, *_: str) -> list[str]:
        return self.capabilities

    def read_model(self, _: Path) -> SimpleNamespace:
        return SimpleNamespace(inputs=(), reshape=lambda _: None)

    def compile_model(self, _: object, device: str, settings: dict[str, object]) -> SimpleNamespace:
        assert device == "CPU"
        self.caches.append(str(settings["CACHE_DIR"]))
        return SimpleNamespace(get_property=lambda _: False, create_infer_request=lambda: None)


def test_each_thing_that_openvinos_key_leaves_out_has_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU with bf16, one folder for all returned a wrong model.

    See docs/understand/decisions/0011-compiled-models-on-disk.md.
    """
    vendor = Recording()
    monkeypatch.setattr(backend, "_openvino", lambda: vendor)

    def compile_for(precision: CpuPrecision) -> None:
        OpenVinoGraph(tmp_path / "decoder.xml", precision, (1,), tmp_path)

    compile_for("fp32")
    compile_for("bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    compile_for("fp32")
    monkeypatch.setattr(backend, "cpu_flags", lambda: "amx_bf16")
    compile_for("fp32")
    vendor.capabilities = ["FP32", "BF16", "FP16"]
    compile_for("fp32")
    vendor.__version__ = "2"
    compile_for("fp32")
    assert len(set(vendor.caches)) == 6
    compile_for("fp32")
    assert len(set(vendor.caches)) == 6
    assert {Path(cache).parent for cache in vendor.caches} == {tmp_path}


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "decoder.xml").write_text("<net")
    with pytest.raises(ArtifactError, match=r"decoder\.xml: OpenVINO cannot load it") as caught:
        OpenVinoGraph(tmp_path / "decoder.xml", "fp32", (1,), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_shapes_that_were_not_built_are_refused(converted: Converted) -> None:
    run = adapter("transformer", converted.graph("transformer"))
    inputs = example_inputs("transformer", SHAPE, 1, torch.float32)
    with pytest.raises(BackendError, match=r"size: got 4x4 .*built for 4x8"):
        run(**{**inputs, "latent": inputs["latent"][..., :4]})
    with pytest.raises(BackendError, match="text: got 13 tokens, this engine was built for up to 12"):
        run(**{**inputs, "text": torch.zeros(1, 13, 128), "text_mask": None})


def test_a_missing_package_and_a_cpu_without_bf16_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(get_property=lambda *_: ["FP32"])
    monkeypatch.setattr(backend, "_openvino", lambda: SimpleNamespace(Core=lambda: core))
    check_cpu("fp32")
    with pytest.raises(BackendError, match="no bf16 instructions; build with --precision fp32"):
        check_cpu("bf16")
    with pytest.raises(BackendError, match="no bf16 instructions"):
        resolve("cpu", "bf16", Machine("a CPU"))
    with pytest.raises(BackendError, match="no bf16 instructions"):
        OpenVinoGraph(Path("decoder.xml"), "bf16", (1,), Path("cache"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match="openvino: the package is missing"):
        OpenVinoGraph(Path("decoder.xml"), "fp32", (1,), Path("cache"))
