"""A host at its limits: no descriptor left, a port in use, IPv4 and IPv6, a stdout without a reader."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import PROCESS_S, ROOT, Program, Server
from raw_client import Raw
from running_server import wait_until

from server.errors import EXIT_LISTEN

LIMIT = 64
READY = r"is ready \(pid (\d+)\)"


@contextlib.contextmanager
def ended(program: Program) -> Iterator[None]:
    """Sends SIGTERM at the end of the block if the program still runs, and waits for its end."""
    try:
        yield
    finally:
        if program.process.poll() is None:
            program.process.terminate()
        program.wait_end()


class Limited(Server):
    """Starts python -m server under `ulimit`."""

    def __init__(self, limits: str, *arguments: str, **environment: str) -> None:
        self.command = ["sh", "-c", f'{limits}; exec "$@"', "sh"]
        super().__init__("--backend", "fake", *arguments, **environment)


def limits_of(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)


def live(raw: Raw) -> int:
    raw.send("GET /health/live HTTP/1.1")
    return raw.read_response("GET").status


def metric(raw: Raw, name: str) -> list[float]:
    raw.send("GET /metrics HTTP/1.1")
    text = raw.read_response("GET").body.decode()
    return [float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_without_descriptors_serves_who_is_there_and_logs_little(workers: str) -> None:
    server = Limited(f"ulimit -n {LIMIT}", "--workers", workers)
    with ended(server), contextlib.ExitStack() as stack:
        url = server.wait_ready()
        old = stack.enter_context(Raw(url))
        assert live(old) == 200
        for _ in range(2 * LIMIT):
            stack.enter_context(Raw(url))
        wait_until(lambda: "new connections wait" in server.output, "the line")
        for _ in range(50):
            assert live(old) == 200
        assert metric(old, "process_open_fds")
        old.send("GET / HTTP/1.1")
        assert old.read_response("GET").status == 200  # a file was opened for it
        stack.close()
        with Raw(url) as new:
            assert live(new) == 200
    assert "Traceback" not in server.output
    assert "socket.accept()" not in server.output
    assert "a connection was lost" not in server.output
    lines = re.findall(r"^\S+ (\S+?),\d+ WARNING (?:new connections wait|a connection was lost)", server.output, re.M)
    assert len(lines) <= int(workers) * (len(set(lines)) + 1), server.output  # one a second


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_soft_limit_is_raised_to_the_hard_one(workers: str) -> None:
    server = Limited("ulimit -Sn 200; ulimit -Hn 300", "--workers", workers)
    with ended(server):
        server.wait_ready()
        pids = [server.process.pid, *map(int, re.findall(READY, server.output))]
        assert len(pids) == (1 if workers == "1" else len(pids))
        assert {limits_of(pid) for pid in pids} == {(300, 300)}


def test_a_worker_that_cannot_be_started_is_told_and_tried_again() -> None:
    server = Limited("true", "--workers", "2")
    with ended(server), contextlib.ExitStack() as stack:
        url = server.wait_ready()
        wait_until(lambda: len(re.findall(READY, server.output)) == 2, "both workers")
        pids = [int(pid) for pid in re.findall(READY, server.output)]
        clients = [stack.enter_context(Raw(url)) for _ in range(2)]
        assert [live(client) for client in clients] == [200, 200]
        assert metric(clients[0], "sana_sprint_worker_ready") == [1, 1]
        _, hard = limits_of(server.process.pid)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: "cannot be started" in server.output, "the line")
        (left,) = [client for client in clients if is_answered(client)]
        assert metric(left, "sana_sprint_workers_desired") == [2]
        assert metric(left, "sana_sprint_worker_ready") == [1]
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        wait_until(lambda: len(re.findall(READY, server.output)) == 3, "another worker", within_s=PROCESS_S)
        wait_until(lambda: metric(left, "sana_sprint_worker_ready") == [1, 1], "its metrics")
    assert server.process.returncode == 0, server.output
    assert "cannot listen" not in server.output


def is_answered(raw: Raw) -> bool:
    try:
        return live(raw) == 200
    except OSError:
        return False


def test_a_drain_with_an_empty_place_ends_well() -> None:
    server = Limited("true", "--workers", "2")
    with ended(server):
        server.wait_ready()
        wait_until(lambda: len(re.findall(READY, server.output)) == 2, "both workers")
        _, hard = limits_of(server.process.pid)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.kill(int(re.findall(READY, server.output)[0]), signal.SIGKILL)
        wait_until(lambda: "cannot be started" in server.output, "the line")
    assert server.process.returncode == 0, server.output
    assert "cannot listen" not in server.output
    assert "Traceback" not in server.output


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_taken_port_is_told_in_one_line_before_anything_is_loaded(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        program = Program("-m", "server", "--backend", "fake", "--workers", workers, "--port", port)
        assert program.wait_end() == EXIT_LISTEN, program.output
    (line,) = program.output.splitlines()
    assert f"CRITICAL cannot listen on 127.0.0.1:{port}: " in line


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("host", ["::", "0:0::0", "0.0.0.0", "localhost", "::1"])
def test_every_address_that_is_listened_on_answers(workers: str, host: str) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this host has no IPv6")
    server = Limited("true", "--workers", workers, "--host", host)
    with ended(server):
        wait_until(lambda: "curl -s" in server.output, "the curl line", within_s=PROCESS_S)
        (url,) = re.findall(r"curl -s (\S+)/generate", server.output)
        port = int(url.rpartition(":")[2])
        others = [f"http://[::1]:{port}"] if host in ("::", "0:0::0") else []
        for where in [url, *others]:
            with Raw(where) as raw:
                assert live(raw) == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stdout_that_is_ascii_or_closed_stops_nothing(workers: str, tmp_path: Path) -> None:
    for case, closing in (("ascii", ""), ("closed", "exec >&-"), ("unread", "")):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        reading, writing = os.pipe()
        log = tmp_path / case
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    *("sh", "-c", f'{closing}\nexec "$@"', "sh", sys.executable, "-m", "server"),
                    *("--backend", "fake", "--port", str(port), "--workers", workers, "--model", "é"),
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONIOENCODING": "ascii"},
                stdout=writing if case == "unread" else subprocess.DEVNULL,
                stderr=file,
            )
        os.close(writing)
        os.close(reading)
        try:
            wait_until(lambda port=port: is_ready(port), f"readiness, {case}", within_s=PROCESS_S)  # type: ignore[misc]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PROCESS_S) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
        assert "Error" not in log.read_text()


def is_ready(port: int) -> bool:
    try:
        with Raw(f"http://127.0.0.1:{port}") as raw:
            raw.send("GET /health/ready HTTP/1.1")
            answer = raw.read_response("GET")
    except OSError:
        return False
    return answer.status == 200 and json.loads(answer.body)["status"] == "ready"
