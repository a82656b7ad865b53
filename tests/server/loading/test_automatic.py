"""--engine auto, with a stand-in for the builder and engines that draw colour fields."""

import json
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import manifests
import numpy as np
import pytest
import stand_in_builder
from running_server import Serve, read_image, wait_until

from engines.artifacts.candidates import Candidate
from engines.artifacts.catalog import EngineRequirements, find_engine
from engines.artifacts.manifest import Manifest, read_manifest
from engines.errors import ArtifactError
from engines.fake import FakeEngine, expected_pixels
from engines.types import Deliver, Engine, EngineInfo, Job, RawImage
from server.loading import automatic
from server.loading.attempts import MAX_ATTEMPTS
from server.loading.automatic import AutomaticEngine, Candidates

SIZE = (64, 64)
WANTED = EngineRequirements("ab" * 32, "openvino", "2026.1", None, "fp32", (SIZE,), 8)
MANIFEST = replace(manifests.MANIFEST, sizes=(SIZE,), batches=(1, 2, 4, 8), steps=(1, 2))


class Named(FakeEngine):
    """A fake engine that counts its jobs and knows whether it was closed."""

    def __init__(self, backend: str, delay_s: float = 0.0) -> None:
        super().__init__(sizes=(SIZE,), default_size=SIZE, delay_s=delay_s)
        self._info = replace(self._info, backend=backend, reasons={})
        self.jobs = 0
        self.closed = False

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        assert not self.closed
        self.jobs += len(jobs)
        return super().generate(jobs, deliver)

    def close(self) -> None:
        self.closed = True
        super().close()


@dataclass
class Bench:
    """EngineOperations on a folder of engines, with fake engines."""

    place: Path
    vendors: tuple[EngineRequirements, ...] = (WANTED,)
    delays_s: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        self.folder = self.place / "engines"
        self.plan: dict[str, Any] = {"log": str(self.place / "log"), "manifest": MANIFEST.to_dict()}
        self.opened: list[Path] = []
        self.plain: list[bool] = []
        self.damaged: list[Path] = []
        self.missing: tuple[str, ...] = ()
        self.missing_of: dict[str, tuple[str, ...]] = {}  # vendor -> what it lacks instead
        self.engines: list[Named] = []

    @property
    def builds(self) -> list[str]:
        log = Path(self.plan["log"])
        return log.read_text().splitlines() if log.exists() else []

    def source(self, *, while_building: bool = False) -> AutomaticEngine:
        (self.place / "plan").write_text(json.dumps(self.plan))
        return AutomaticEngine(self, while_building=while_building)

    def add(self, name: str, manifest: Manifest) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        manifest.write(folder)
        return folder

    @property
    def build_command(self) -> tuple[str, ...]:
        return sys.executable, stand_in_builder.__file__, str(self.place / "plan")

    def find_candidates(self) -> Candidates:
        named = enumerate(self.vendors)
        lacks = [self.missing_of.get(one.vendor, self.missing) for one in self.vendors]
        return Candidates(
            [Candidate(one.vendor, f"tiny-{i}", one, ("--vendor", one.vendor), lacks[i]) for i, one in named]
        )

    def find_built(self, candidate: automatic.Candidate, exclude: Collection[Path]) -> tuple[Path | None, list[str]]:
        assert isinstance(candidate.requirements, EngineRequirements)
        return find_engine(self.folder, candidate.requirements, exclude)

    def open_built(self, path: Path) -> Engine:
        if path in self.damaged:
            self.damaged.remove(path)
            raise ArtifactError(f"{path}: damaged")
        self.opened.append(path)
        vendor = read_manifest(path).vendor
        [delay_s] = [delay for one, delay in zip(self.vendors, self.delays_s, strict=True) if one.vendor == vendor]
        self.engines.append(Named(vendor, delay_s))
        return self.engines[-1]

    def load_pytorch(self, built_sizes_only: bool) -> Engine:
        self.plain.append(built_sizes_only)
        self.engines.append(Named("eager"))
        return self.engines[-1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(automatic, "PAUSE_S", 0.01)
    return Bench(tmp_path)


def loaded(source: AutomaticEngine) -> EngineInfo:
    return source.load(lambda: None).info


def test_what_fits_is_served_and_nothing_is_built(bench: Bench) -> None:
    folder = bench.add("by hand", replace(MANIFEST, sizes=((32, 32), SIZE)))
    info = loaded(bench.source())
    assert (info.backend, bench.opened, bench.builds, bench.plain) == ("openvino", [folder], [], [])
    assert str(folder) in info.reasons["engine"]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"checkpoint_sha256": "00" * 32}, "of other weights"),
        ({"versions": {"openvino": "2025.3"}}, "built by openvino 2025.3, here is 2026.1"),
        ({"precision": "bf16"}, "in bf16, wanted fp32"),
        ({"sizes": ((32, 32),)}, "without 64x64"),
        ({"batches": (1, 2)}, "for batches of 2, wanted 8"),
        ({"vendor": "tensorrt", "compute_capability": "8.9"}, "for tensorrt on"),
        ({"format": 0}, "has format 0"),
    ],
)
def test_what_does_not_fit_is_named_and_built_beside(
    other: dict[str, Any], why: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.build")
    bench.add("other", replace(MANIFEST, **other))
    assert loaded(bench.source()).backend == "openvino"
    assert bench.opened == [bench.folder / "tiny-0"]
    assert len(bench.builds) == 1
    assert "does not fit: other: " in caplog.text
    assert why in caplog.text


def test_a_build_is_told_on_ready_as_metrics_and_in_the_log(
    serve: Serve, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.build")
    gate = bench.place / "gate"
    bench.plan["gate"] = str(gate)
    running = serve(bench.source(), ready=False)

    def told() -> dict[str, Any]:
        answer = running.client.get("/health/ready")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        found: dict[str, Any] = answer.json()
        return found

    wait_until(lambda: told().get("building", {}).get("module") == "compilation of the decoder", "the third step")
    problem = told()
    assert problem["building"]["percent"] == 50
    assert problem["building"]["seconds_left"] >= 0
    assert problem["detail"].startswith("the engine is being built: compilation of the decoder, 50 %, about ")
    assert running.metric("sana_sprint_engine_build_progress") == 0.5
    assert running.metric("sana_sprint_engine_build_seconds_left") > 0
    gate.touch()
    wait_until(lambda: running.client.get("/health/ready").status_code == 200, "readiness")
    assert running.client.get("/v1/info").json()["backend"] == "openvino"
    assert running.metric("sana_sprint_engine_build_progress") == 1
    assert "compilation of the decoder, 50 %" in caplog.text
    phases = running.client.get("/v1/info").json()["start_s"]
    assert phases["process"] >= phases["load"] > phases["warm-up"] >= 0
    assert phases["server"] + phases["load"] + phases["warm-up"] == pytest.approx(phases["process"], abs=0.02)


def test_two_on_one_volume_build_once_and_both_serve(bench: Bench) -> None:
    gate = bench.place / "gate"
    bench.plan["gate"] = str(gate)
    sources = [bench.source(), bench.source()]
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(loaded, source) for source in sources]

        def modules() -> list[str]:
            return sorted(now.module for source in sources if (now := source.building()))

        theirs = "compilation of the decoder"
        wait_until(
            lambda: modules() == [f"another process builds: {theirs}", theirs], "one that builds, one that waits"
        )
        gate.touch()
        assert [load.result().backend for load in loads] == ["openvino", "openvino"]
    assert len(bench.builds) == 1


def test_a_builder_that_is_killed_leaves_pytorch_and_the_next_start_builds(bench: Bench) -> None:
    gate = bench.place / "gate"
    bench.plan["gate"] = str(gate)
    source = bench.source()
    with ThreadPoolExecutor() as pool:
        load = pool.submit(loaded, source)
        wait_until(lambda: (now := source.building()) is not None and now.percent == 50, "half of the build")
        os.kill(int(bench.builds[0].split()[0]), signal.SIGKILL)
        info = load.result()
    assert info.backend == "eager"
    assert "killed by SIGKILL" in info.reasons["engine"]
    gate.touch()
    assert loaded(bench.source()).backend == "openvino"
    assert sorted(path.name for path in bench.folder.iterdir()) == [".tiny-0.lock", "tiny-0"]


def test_builds_that_are_killed_again_and_again_end(bench: Bench) -> None:
    bench.plan |= {"fail": "out: no space left while writing", "code": 75}
    reasons = [loaded(bench.source()).reasons["engine"] for _ in range(5)]
    assert "no space left" in reasons[2]
    assert "3 builds were killed or found no room" in reasons[3]
    assert len(bench.builds) == 3


def test_a_build_that_fails_is_not_repeated_until_somebody_says_so(bench: Bench) -> None:
    bench.plan |= {"fail": "precision: decoder.stage reaches 70000", "code": 1}
    for _ in range(3):
        info = loaded(bench.source())
        assert info.backend == "eager"
        assert "decoder.stage reaches 70000" in info.reasons["engine"]
    assert len(bench.builds) == 1
    record = bench.folder / ".tiny-0.attempts.json"
    assert f"remove {record}" in info.reasons["engine"]
    record.unlink()
    del bench.plan["fail"]
    assert loaded(bench.source()).backend == "openvino"


def test_a_failure_holds_for_what_failed_alone(bench: Bench) -> None:
    bench.plan |= {"fail": "refused", "code": 1}
    assert loaded(bench.source()).backend == "eager"
    bench.vendors = (replace(WANTED, version="2026.2"),)
    del bench.plan["fail"]
    bench.plan["manifest"] = replace(MANIFEST, versions={"openvino": "2026.2"}).to_dict()
    assert loaded(bench.source()).backend == "openvino"


def test_what_is_built_and_does_not_fit_is_no_reason_to_build_for_ever(bench: Bench) -> None:
    bench.plan["manifest"] = replace(MANIFEST, versions={"openvino": "2025.3"}).to_dict()
    for _ in range(2):
        assert "what was built does not fit" in loaded(bench.source()).reasons["engine"]
    assert len(bench.builds) == 1


def test_without_the_packages_of_a_build_pytorch_serves_and_the_command_is_told(bench: Bench) -> None:
    bench.missing = ("onnx",)
    told = loaded(bench.source()).reasons["engine"]
    assert "without onnx" in told
    assert "python build_engine.py --vendor openvino" in told
    assert bench.builds == []


def test_damaged_engines_are_built_again_once(bench: Bench) -> None:
    damaged = bench.add("damaged", MANIFEST)
    bench.damaged = [damaged]
    assert loaded(bench.source()).backend == "openvino"
    assert bench.opened == [bench.folder / "tiny-0"]
    bench.damaged = [damaged, bench.folder / "tiny-0"]
    assert loaded(bench.source()).backend == "eager"
    assert len(bench.builds) == 1


def test_a_disk_that_cannot_be_written_leaves_pytorch(bench: Bench) -> None:
    bench.folder.write_text("a file")
    assert "File exists" in loaded(bench.source()).reasons["engine"]


def test_the_end_of_the_server_ends_the_build_and_counts_for_nothing(bench: Bench) -> None:
    times = MAX_ATTEMPTS + 1
    bench.plan["gate"] = str(bench.place / "gate")
    for _ in range(times):
        _end_in_the_middle(bench)
    assert len(bench.builds) == times


def _end_in_the_middle(bench: Bench) -> None:
    source, waiting = bench.source(), bench.source()
    with ThreadPoolExecutor() as pool:
        load = pool.submit(loaded, source)
        wait_until(lambda: (now := source.building()) is not None and now.percent == 50, "half of the build")
        other = pool.submit(loaded, waiting)
        wait_until(lambda: waiting.building() is not None, "one that waits")
        waiting.close()
        assert "shutting down" in other.result().reasons["engine"]
        source.close()
        assert "shutting down" in load.result().reasons["engine"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(bench.builds[-1].split()[0]), 0)


def test_of_two_vendors_the_faster_one_serves_by_a_measurement_that_is_kept(bench: Bench) -> None:
    bench.vendors = (replace(WANTED, vendor="slow"), replace(WANTED, vendor="quick"))
    bench.delays_s = (0.05, 0.0)
    for one in bench.vendors:
        bench.add(one.vendor, replace(MANIFEST, vendor=one.vendor, versions={one.vendor: "2026.1"}))
    info = loaded(bench.source())
    assert info.backend == "quick"
    assert "slow" in info.reasons["engine"]
    assert [engine.closed for engine in bench.engines] == [True, False]
    bench.engines.clear()
    assert loaded(bench.source()).backend == "quick"
    assert [engine.jobs for engine in bench.engines] == [0]


def test_two_vendors_are_built_measured_once_and_the_faster_one_serves(bench: Bench) -> None:
    tensorrt, native = (replace(WANTED, vendor=name, version=None, capability="9.0") for name in ("tensorrt", "native"))
    bench.vendors, bench.delays_s = (tensorrt, native), (0.05, 0.0)
    bench.plan["manifests"] = {
        f"tiny-{index}": replace(MANIFEST, vendor=one.vendor, compute_capability="9.0", versions={}).to_dict()
        for index, one in enumerate(bench.vendors)
    }
    info = loaded(bench.source())
    assert info.backend == "native"
    assert info.reasons["engine"].startswith("native: the fastest for one image: native ")
    assert len(bench.builds) == 2
    measured = (bench.folder / ".fastest.json").read_text()
    bench.vendors, bench.delays_s = (native, tensorrt), (0.05, 0.0)  # the opposite, if it were measured again
    assert loaded(bench.source()).backend == "native"
    assert (len(bench.builds), (bench.folder / ".fastest.json").read_text()) == (2, measured)
    bench.vendors, bench.delays_s = (native,), (0.0,)  # TensorRT is not installed any more
    assert loaded(bench.source()).reasons["engine"].startswith("native: the engine that fits")


def test_a_vendor_that_cannot_build_here_starts_no_swap(bench: Bench) -> None:
    bench.vendors, bench.delays_s = (WANTED, replace(WANTED, vendor="native")), (0.0, 0.0)
    bench.missing_of = {"native": ("gcc or clang",)}
    bench.add("ready", MANIFEST)
    info = loaded(bench.source(while_building=True))
    assert (info.backend, bench.plain, bench.builds) == ("openvino", [], [])


def test_one_vendor_that_fails_leaves_the_other(bench: Bench) -> None:
    bench.vendors = (replace(WANTED, vendor="poor"), replace(WANTED, vendor="good"))
    bench.delays_s = (0.0, 0.0)
    bench.add("good", replace(MANIFEST, vendor="good", versions={"good": "2026.1"}))
    bench.plan |= {"fail": "no", "code": 1}
    assert loaded(bench.source()).backend == "good"


def test_without_a_vendor_pytorch_serves_whole(bench: Bench) -> None:
    bench.vendors = ()
    assert loaded(bench.source()).backend == "eager"
    assert bench.plain == [False]


# --- --serve-while-building ---------------------------------------------------------------------------------------


REQUESTS = 400  # 2,000 in test_real_builds.py


@pytest.fixture
def gated_build(bench: Bench) -> Iterator[Path]:
    gate = bench.place / "gate"
    bench.plan["gate"] = str(gate)
    yield gate
    gate.touch()


def test_swap_under_load_loses_nothing_and_answers_nothing_wrong(serve: Serve, bench: Bench, gated_build: Path) -> None:
    running = serve(bench.source(while_building=True), max_queue=1000)
    assert bench.plain == [True]
    assert running.client.get("/health/ready").json()["building"]["module"]
    answered = threading.Semaphore(0)

    def ask(seed: int) -> str | None:
        answer = running.generate("a circle", seed=seed, num_inference_steps=1 + seed % 2)
        answered.release()
        if answer.status_code != 200:
            return answer.text
        expected = expected_pixels(Job("a circle", seed, *SIZE, 1 + seed % 2))
        return None if np.array_equal(read_image(answer.content), expected) else f"seed {seed} is wrong"

    with ThreadPoolExecutor(32) as pool:
        asked = [pool.submit(ask, seed) for seed in range(REQUESTS)]
        for _ in range(REQUESTS // 4):
            answered.acquire()
        gated_build.touch()
        wrong = [told for one in asked if (told := one.result()) is not None]
    assert wrong == []
    old, new = bench.engines
    assert old.jobs + new.jobs == REQUESTS
    assert old.jobs >= REQUESTS // 4
    assert new.jobs > 0
    assert (old.closed, new.closed) == (True, False)
    told = running.client.get("/v1/info").json()
    assert told["backend"] == "openvino"
    published = [line for line in running.client.get("/metrics").text.splitlines() if "engine_info{" in line]
    assert len(published) == 1
    assert 'backend="openvino"' in published[0]


def test_an_idle_server_changes_its_engine_too(serve: Serve, bench: Bench, gated_build: Path) -> None:
    running = serve(bench.source(while_building=True))
    assert running.client.get("/v1/info").json()["backend"] == "eager"
    gated_build.touch()
    wait_until(lambda: running.client.get("/v1/info").json()["backend"] == "openvino", "the other engine")
    assert "building" not in running.client.get("/health/ready").json()


def test_a_build_that_fails_meanwhile_leaves_what_serves(serve: Serve, bench: Bench, gated_build: Path) -> None:
    bench.plan |= {"fail": "too far from the reference", "code": 1}
    running = serve(bench.source(while_building=True))
    gated_build.touch()

    def reason() -> str:
        return str(running.client.get("/v1/info").json()["reasons"]["engine"])

    wait_until(lambda: "too far from the reference" in reason(), "the reason")
    assert running.generate().status_code == 200
    assert len(bench.engines) == 1
