"""One thread for each usable core: affinity, cgroup quotas of both versions, OMP_NUM_THREADS."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from program import ROOT, Server

from server.loading.engine_loader import load
from server.settings import Settings

CPU = Path("/sys/fs/cgroup/cpu")
AFFINITY = len(os.sched_getaffinity(0))
FREE = {"OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}


def host(tmp_path: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """Writes a /proc and a /sys as a container sees them."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
FOLDER = "sys/fs/cgroup/cpu,cpuacct"


def usable_cores(root: Path, cores: int) -> tuple[int, str]:
    """Returns the answer of a process that may run on `cores` cores."""
    code = (
        "import os, sys; from pathlib import Path\n"
        f"os.sched_getaffinity = lambda _: set(range({cores}))\n"
        "from server.processes.cores import usable_cores\n"
        "found = usable_cores(Path(sys.argv[1])); print(found.threads); print(found.reason)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(root)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return int(told[0]), told[1]


@pytest.mark.parametrize(("quota", "count"), [("100000", 1), ("150000", 1), ("250000", 2), ("20000", 1), ("max", 8)])
def test_the_quota_of_version_2(tmp_path: Path, quota: str, count: int) -> None:
    root = host(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    found, reason = usable_cores(root, 8)
    assert found == count
    assert reason.startswith(f"{count}: ")
    assert ("quota" in reason) == (quota != "max")


@pytest.mark.parametrize("within", ["pod/box", "pod", ""])
def test_the_smallest_quota_from_here_upwards_counts(tmp_path: Path, within: str) -> None:
    files = {f"sys/fs/cgroup/{folder}/cpu.max": "max 100000\n" for folder in ("pod/box", "pod", ".")}
    files[f"sys/fs/cgroup/{within or '.'}/cpu.max"] = "300000 100000\n"
    assert usable_cores(host(tmp_path, "0::/pod/box\n", V2, files), 8)[0] == 3


@pytest.mark.parametrize("root", ["/", "/docker/abc"])
@pytest.mark.parametrize(("quota", "count"), [("-1", 8), ("200000", 2), ("50000", 1)])
def test_the_quota_of_version_1(tmp_path: Path, root: str, quota: str, count: int) -> None:
    inside = "docker/abc" if root == "/" else "."
    files = {f"{FOLDER}/{inside}/cpu.cfs_quota_us": quota, f"{FOLDER}/{inside}/cpu.cfs_period_us": "100000"}
    groups = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n0::/\n"
    assert usable_cores(host(tmp_path, groups, V1.format(root=root), files), 8)[0] == count


def test_a_host_without_cgroups_has_its_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, 3) == (3, "3: the cores that this process may run on")


@contextmanager
def served(**environment: str) -> Iterator[dict[str, object]]:
    """Returns /v1/info of a server."""
    server = Server("--backend", "fake", **{**FREE, **environment})
    try:
        told: dict[str, object] = httpx.get(f"{server.wait_ready()}/v1/info").json()
        yield told
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.wait_end()


def test_number_and_reason_are_told() -> None:
    with served() as told:
        assert 1 <= int(str(told["threads"])) <= AFFINITY
        assert str(told["reasons"]["threads"]).startswith(f"{told['threads']}: ")  # type: ignore[index]  # an object
    with served(OMP_NUM_THREADS="3") as told:
        assert told["threads"] == 3
        assert "OMP_NUM_THREADS" in told["reasons"]["threads"]  # type: ignore[index]  # an object


def test_the_engine_computes_with_as_many_and_they_do_not_spin() -> None:
    """Torch itself, in a process without OpenMP's variables."""
    code = (
        "import os; from server.processes.cores import configure_openmp\n"
        "found = configure_openmp(os.environ)\n"
        "import torch\n"
        "assert torch.get_num_threads() == found.threads, (torch.get_num_threads(), found)\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "assert os.environ['OMP_NUM_THREADS'] == str(found.threads)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in FREE}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
    kept = (
        "import os; from server.processes.cores import configure_openmp\n"
        "configure_openmp(os.environ); assert 'OMP_WAIT_POLICY' not in os.environ"
    )
    environment["GOMP_SPINCOUNT"] = "100"
    subprocess.run([sys.executable, "-c", kept], cwd=ROOT, check=True, env=environment)


@pytest.mark.skipif(not os.access(CPU / "cgroup.procs", os.W_OK), reason="needs a cgroup (v1) that may be written")
@pytest.mark.skipif(AFFINITY < 2, reason="needs two cores, to have less than all")
def test_a_quota_of_one_core_is_one_thread() -> None:
    group = CPU / f"sprint-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        (group / "cpu.cfs_period_us").write_text("100000")
        code = "from server.processes.cores import usable_cores; print(usable_cores())"
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "threads=1" in done.stdout
        assert "quota is 1, of" in done.stdout
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("environment", "sleep"),
    [
        ({}, False),
        ({"OMP_WAIT_POLICY": "passive"}, True),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False),
        ({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}, False),
    ],
)
def test_a_narrow_model_has_one_thread_where_threads_sleep(
    environment: dict[str, str], sleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, as in tests on several processes, there is nothing to choose
    try:
        reasons = load(Settings(model="tiny", device="cpu")).info.reasons
    finally:
        torch.set_num_threads(before)
    assert ("compute threads" in reasons) == sleep
