"""Several processes behind one port: python -m server --workers N, with the fake engine."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from program import Program
from prometheus_client.parser import text_string_to_metric_families
from running_server import PATIENCE_S, wait_until
from websockets.sync.client import connect

from server.errors import EXIT_LISTEN, EXIT_SETTINGS, EXIT_START, SettingsError
from server.processes.supervisor import environments
from server.settings import Settings

WORKERS = 2
BODY = {"prompt": "a red circle", "seed": 7, "width": 64, "height": 64}


class Supervised(Program):
    """A started `python -m server --workers 2`."""

    def __init__(self, *arguments: str) -> None:
        super().__init__("-m", "server", "--port", "0", "--workers", str(WORKERS), *arguments)

    def pids(self) -> dict[int, int]:
        """Returns slot -> the last process that became ready in it."""
        return {int(place): int(pid) for place, pid in re.findall(r"worker (\d) is ready \(pid (\d+)\)", self.output)}

    def wait_ready(self) -> httpx.Client:
        wait_until(lambda: len(self.pids()) == WORKERS or self.process.poll() is not None, "all workers")
        found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", self.output)
        assert found, self.output
        limits = httpx.Limits(max_keepalive_connections=0)  # a new connection for each request
        return httpx.Client(base_url=found.group(1), timeout=PATIENCE_S, limits=limits)


def stop(supervised: Supervised) -> None:
    if supervised.process.poll() is None:
        supervised.process.send_signal(signal.SIGTERM)
    supervised.wait_end()


@pytest.fixture(scope="module")
def slow() -> Iterator[Supervised]:
    """Workers that run one job at a time in 300 ms; the last test that uses them ends them."""
    supervised = Supervised("--backend", "fake", "--fake-delay-ms", "300", "--max-batch", "1")
    yield supervised
    stop(supervised)


@pytest.fixture(scope="module")
def quick() -> Iterator[Supervised]:
    """Workers that the last test kills."""
    supervised = Supervised("--backend", "fake")
    yield supervised
    stop(supervised)


def samples(client: httpx.Client, name: str) -> dict[str, float]:
    """Returns the values of a metric, labelled by `replica` only, by replica."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {s.labels["replica"]: s.value for family in families for s in family.samples if s.name == name}


def test_connections_are_shared_and_numbers_add_up(quick: Supervised) -> None:
    with quick.wait_ready() as client:
        answers = [client.post("/generate", json=BODY) for _ in range(4 * WORKERS)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        text = client.get("/metrics").text
        made = samples(client, "sana_sprint_images_total")
        assert len(re.findall(r"^# TYPE sana_sprint_images_total", text, re.MULTILINE)) == 1
        assert set(samples(client, "sana_sprint_engine_info")) == {str(place) for place in range(WORKERS)}
        assert sum(made.values()) == 4 * WORKERS
        assert min(made.values()) >= WORKERS


def test_a_killed_worker_loses_its_own_and_is_started_again(slow: Supervised) -> None:
    supervised = slow
    with supervised.wait_ready() as client, ThreadPoolExecutor(4 * WORKERS) as pool:
        before = supervised.pids()

        def ask(_: int) -> int:
            try:
                return client.post("/generate", json=BODY).status_code
            except httpx.TransportError:
                return 0

        asked = [pool.submit(ask, number) for number in range(4 * WORKERS)]
        wait_until(lambda: sum(samples(client, "sana_sprint_jobs_running").values()) == WORKERS, "a job in each worker")
        os.kill(before[1], signal.SIGKILL)
        answers = [one.result() for one in asked]
        assert set(answers) == {0, 200}
        assert answers.count(200) >= samples(client, "sana_sprint_images_total")["0"] >= 1
        wait_until(lambda: supervised.pids()[1] != before[1], "another worker 1")
        after = supervised.pids()
        assert after[0] == before[0]
        assert {ask(number) for number in range(4 * WORKERS)} == {200}
        assert set(samples(client, "sana_sprint_images_total")) == {"0", "1"}


def test_sigterm_drains_all(slow: Supervised) -> None:
    with slow.wait_ready() as client, ThreadPoolExecutor(4 * WORKERS) as pool:
        asked = [pool.submit(client.post, "/generate", json=BODY) for _ in range(4 * WORKERS)]
        wait_until(lambda: sum(samples(client, "sana_sprint_jobs_waiting").values()) >= WORKERS, "jobs in the queues")
        slow.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503, "the drain")
        refused = client.post("/generate", json=BODY)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert [one.result().status_code for one in asked] == [200] * 4 * WORKERS
    assert slow.wait_end() == 0, slow.output
    assert "Traceback" not in slow.output


def test_a_drawing_session_stays_with_one_worker(quick: Supervised) -> None:
    with quick.wait_ready() as client, connect(f"ws://{client.base_url.netloc.decode()}/v1/live") as socket:
        assert json.loads(socket.recv(PATIENCE_S))["type"] == "ready"
        sessions = samples(client, "sana_sprint_live_sessions")
        assert sorted(sessions.values()) == [0, 1]


def test_one_worker_can_be_drained_alone(quick: Supervised) -> None:
    """Connections on their way to it may still be refused; then the other workers get all."""
    with quick.wait_ready() as client:
        before = quick.pids()
        os.kill(before[0], signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 200, "another worker's answer")
        wait_until(lambda: quick.pids()[0] != before[0], "another worker 0")
        assert quick.pids()[1] == before[1]


def test_workers_end_with_their_supervisor(quick: Supervised) -> None:
    quick.wait_ready().close()
    quick.process.kill()

    def gone(pid: int) -> bool:
        return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"

    wait_until(lambda: all(map(gone, quick.pids().values())), "the end of the workers")


def test_a_checkpoint_that_is_none_stops_the_start(tmp_path: Path) -> None:
    supervised = Supervised("--model", str(tmp_path))
    assert supervised.wait_end() == EXIT_START, supervised.output
    assert "cannot start" in supervised.output


def test_a_taken_port_stops_the_start_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        supervised = Supervised("--backend", "fake", "--port", str(taken.getsockname()[1]))
        assert supervised.wait_end() == EXIT_LISTEN, supervised.output
    assert "cannot listen on 127.0.0.1" in supervised.output
    assert "Traceback" not in supervised.output


def test_bad_settings_stop_the_start() -> None:
    supervised = Supervised("--backend", "fake", "--api-key-file", "no/such/file")
    assert supervised.wait_end() == EXIT_SETTINGS, supervised.output


def test_each_worker_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    settings = Settings(workers=4)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(settings, {}, tmp_path)] == ["0", "1", "2", "3"]
    chosen = {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c,3"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(settings, chosen, tmp_path)] == [
        *("GPU-a", "GPU-b", "GPU-c", "3")
    ]
    assert {one["CUDA_DEVICE_ORDER"] for one in environments(settings, chosen, tmp_path)} == {"PCI_BUS_ID"}
    with pytest.raises(SettingsError, match=r"--workers: got 5, allowed: at most 4, one for each GPU \(0, 1, 2, 3\)"):
        environments(Settings(workers=5), {}, tmp_path)


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"backend": "fake"}])
def test_without_a_gpu_workers_share_the_cores(tmp_path: Path, options: dict[str, str]) -> None:
    if options:
        (tmp_path / "nvidia0").touch()
    found = environments(Settings(workers=2, **options), {}, tmp_path)  # type: ignore[arg-type]  # str for str fields
    assert [int(one["OMP_NUM_THREADS"]) for one in found] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2
    assert all("CUDA_VISIBLE_DEVICES" not in one for one in found)
    kept = environments(Settings(workers=2), {"OMP_NUM_THREADS": "7"}, tmp_path / "none")
    assert {one["OMP_NUM_THREADS"] for one in kept} == {"7"}
