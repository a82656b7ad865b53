"""TensorRT engines at run time, on a fake module that reads and writes the addresses it receives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest
import torch
from torch import Tensor

from engines.artifacts.loading import LoadedModules
from engines.artifacts.reference import MODULES
from engines.backends.tensorrt.builder import build_engine
from engines.backends.tensorrt.log import Log
from engines.backends.tensorrt.runtime import Scratch, TensorRtGraph
from engines.errors import ArtifactError, BackendError, BuildError, OutOfMemoryError

STREAM = 7
CPU = torch.device("cpu")


def graph(
    folder: Path, batches: tuple[int, ...] = (1, 2, 4), trt: Any = fake_tensorrt, contexts: int = 99
) -> TensorRtGraph:
    (folder / "module.engine").write_bytes(fake_tensorrt.plan(batches, contexts))
    return opened(folder, batches, folder / "cache" / "module.jit", trt)


def opened(folder: Path, batches: tuple[int, ...], jit: Path, trt: Any = fake_tensorrt) -> TensorRtGraph:
    return TensorRtGraph(trt, folder / "module.engine", batches, jit, Scratch(CPU), stream=lambda: STREAM)


def inputs(batch: int) -> dict[str, Tensor]:
    x = torch.arange(batch * 4, dtype=torch.float32).reshape(batch, 4) + 1
    return {"x": x, "keep": torch.arange(batch) % 2 == 0}


def expected(arguments: dict[str, Tensor], profile: int) -> Tensor:
    return (2 * arguments["x"] + profile) * arguments["keep"][:, None]


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_a_batch_runs_in_its_buckets_profile_on_torchs_stream(batch: int, profile: int, tmp_path: Path) -> None:
    run = graph(tmp_path)
    arguments = inputs(batch)
    y, keep = run(arguments)
    assert torch.equal(y, expected(arguments, profile))
    assert torch.equal(keep, arguments["keep"])
    [context] = run._engine.contexts
    assert (context.profile, context.runs, set(context.streams)) == (profile, 1, {STREAM})
    run(arguments)
    assert run._engine.contexts == [context]


def test_batches_beyond_the_largest_bucket_run_in_pieces(tmp_path: Path) -> None:
    run = graph(tmp_path, (1, 2))
    arguments = inputs(5)
    y, keep = run(arguments)
    assert torch.equal(y[:4], expected(arguments, 1)[:4])
    assert torch.equal(y[4:], expected(arguments, 0)[4:])
    assert torch.equal(keep, arguments["keep"])


def test_results_are_the_callers_own_and_inputs_may_be_views_of_another_type(tmp_path: Path) -> None:
    run = graph(tmp_path)
    first = run(inputs(2))[0]
    before = first.clone()
    wide = inputs(2)["x"].double().repeat(1, 2)[:, ::2]
    assert torch.equal(run({"x": wide, "keep": torch.tensor([True, True])})[0], 2 * wide.float() + 1)
    assert torch.equal(first, before)


def test_a_replica_has_contexts_of_its_own(tmp_path: Path) -> None:
    run = graph(tmp_path)
    other = run.new_context()
    arguments = inputs(1)
    for each in (run, other, run):
        assert torch.equal(each(arguments)[0], expected(arguments, 0))
    assert [context.runs for context in run._engine.contexts] == [2, 1]


def test_all_contexts_share_memory_for_activations(tmp_path: Path) -> None:
    scratch = Scratch(CPU)
    (tmp_path / "module.engine").write_bytes(fake_tensorrt.plan((1, 2)))
    runs = [
        TensorRtGraph(fake_tensorrt, tmp_path / "module.engine", (1, 2), tmp_path / "jit", scratch, lambda: STREAM)
        for _ in range(2)
    ]
    scratch.reserve(9000)
    for run in (*runs, runs[0].new_context()):
        for batch in (1, 2):
            run(inputs(batch))
    assert len({context.memory for run in runs for context in run._engine.contexts}) == 1
    assert scratch.block(9000).data_ptr() == runs[0]._engine.contexts[0].memory
    assert scratch.block(9001).data_ptr() != runs[0]._engine.contexts[0].memory


def test_every_set_of_drop_ins_has_contexts_of_its_own(tmp_path: Path) -> None:
    run = graph(tmp_path)
    manifest: Any = SimpleNamespace(tokens=4)
    graphs = {name: {(4, 4): run} for name in MODULES}
    loaded = LoadedModules(manifest, torch.float16, graphs)
    graphs_of_sets = [loaded.new_context().decoder._graph_at((4, 4)) for _ in range(3)]
    assert len({id(one) for one in (run, *graphs_of_sets)}) == 4


def test_a_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"module: x of shape \[1, 5\] is not what it was built for"):
        graph(tmp_path)({"x": torch.zeros(1, 5), "keep": torch.tensor([True])})


def test_a_plan_of_another_maker_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "module.engine").write_bytes(b"TRT!")
    with pytest.raises(ArtifactError, match=r"module\.engine: fake_tensorrt refuses it: bad magic$"):
        opened(tmp_path, (1,), tmp_path / "jit")


def test_too_little_memory_and_a_failed_launch_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="module: no memory for a context"):
        graph(tmp_path, contexts=0)(inputs(1))
    run = graph(tmp_path)
    run(inputs(1))
    run._engine.contexts[0].fails = True
    with pytest.raises(BackendError, match="module: fake_tensorrt failed: out of luck"):
        run(inputs(1))


def test_the_inspector_counts_layers_by_what_they_read_and_write(tmp_path: Path) -> None:
    assert graph(tmp_path).layers_by_precision() == {"FP16": 4, "FP8": 3, "FP32": 1}


class JitEngine(fake_tensorrt.Engine):
    """Behaves as tensorrt_rtx, which compiles kernels when it loads an engine and can save them."""

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(content=b"", serialize=lambda: b"kernels")
        cache.deserialize = lambda content: setattr(cache, "content", content)
        config = SimpleNamespace(
            create_runtime_cache=lambda: cache, dynamic_shapes_kernel_specialization_strategy="lazy"
        )
        config.set_runtime_cache = lambda chosen: setattr(config, "cache", chosen)
        config.set_execution_context_allocation_strategy = lambda chosen: setattr(config, "strategy", chosen)
        return config


class JitRuntime(fake_tensorrt.Runtime):
    def deserialize_cuda_engine(self, content: bytes) -> JitEngine:
        engine = super().deserialize_cuda_engine(content)
        assert engine is not None
        return JitEngine(engine.batches, engine.left, engine.logger)


JIT = SimpleNamespace(
    **{
        **vars(fake_tensorrt),
        "Runtime": JitRuntime,
        "DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager"),
    }
)


def test_kernels_compiled_on_the_card_are_kept(tmp_path: Path) -> None:
    run = graph(tmp_path, trt=JIT)
    assert run.from_cache == ()
    keep = tmp_path / "cache" / "module.jit"
    assert not keep.exists(), "nothing has run"
    run(inputs(1))
    assert keep.read_bytes() == b"kernels"
    keep.unlink()
    run(inputs(1))
    assert not keep.exists(), "a bucket is kept once"
    keep.write_bytes(b"earlier")
    again = graph(tmp_path, trt=JIT)
    again(inputs(1))
    settings = again._engine.contexts[0].settings
    assert settings.cache.content == b"earlier"
    assert again.from_cache == again._buckets, "so that it is compared with the reference"
    assert settings.dynamic_shapes_kernel_specialization_strategy == "eager", "or a graph holds kernels for any shape"


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert graph(tmp_path, trt=JIT)(inputs(1))


def test_on_the_card_each_bucket_gets_a_profile_and_timings_are_carried_on(tmp_path: Path) -> None:
    plan, timing = tmp_path / "module.engine", tmp_path / "timing.cache"
    for expected in (b"+", b"++"):
        details = build_engine(fake_tensorrt, tmp_path / "module.onnx", plan, (1, 4), (9, 0), timing)
        assert timing.read_bytes() == expected
    assert details == {"layers": 3, "activation_bytes": 4096, "batches": [1, 4]}
    run = opened(tmp_path, (1, 4), tmp_path / "jit")
    assert torch.equal(run(inputs(3))[0], (2 * inputs(3)["x"] + 1) * inputs(3)["keep"][:, None])


@pytest.mark.parametrize("keep", [b"of another card", b"torn"])
def test_timings_that_do_not_fit_are_measured_anew(keep: bytes, tmp_path: Path) -> None:
    timing = tmp_path / "timing.cache"
    timing.write_bytes(keep)
    build_engine(fake_tensorrt, tmp_path / "module.onnx", tmp_path / "plan", (1,), (9, 0), timing)
    assert timing.read_bytes() == b"+"


def test_a_profile_that_the_engine_lacks_is_told(tmp_path: Path) -> None:
    (tmp_path / "module.engine").write_bytes(fake_tensorrt.plan((1,)))
    with pytest.raises(BackendError, match="module: no profile for a batch of 2: no reason given"):
        opened(tmp_path, (1, 2), tmp_path / "jit")(inputs(2))


def test_what_is_verbose_is_not_kept() -> None:
    log = Log()
    logger = log.attach(fake_tensorrt)
    for severity in range(5):
        logger.log(severity, str(severity))
    assert [severity for severity, _ in log.lines] == [0, 1, 2, 3]


def test_a_failed_build_gives_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"broken: fake_tensorrt refuses the graph: cannot open .*broken\.onnx"):
        build_engine(fake_tensorrt, tmp_path / "broken.onnx", tmp_path / "plan", (1,), (9, 0), tmp_path / "timing")
    monkeypatch.setattr(fake_tensorrt.Config, "broken", True)
    with pytest.raises(BuildError, match="module: fake_tensorrt cannot compile the graph: no kernel fits"):
        build_engine(fake_tensorrt, tmp_path / "module.onnx", tmp_path / "plan", (1,), (9, 0), tmp_path / "timing")
