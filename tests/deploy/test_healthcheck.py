"""deploy/healthcheck.py finds a real server at any address, set by flag or variable."""

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from program import PROCESS_S, ROOT, Program
from running_server import wait_until

DEAD_PROXY = "http://127.0.0.1:1"
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), DEAD_PROXY)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@contextmanager
def served(*flags: str, **environment: str) -> Iterator[dict[str, str]]:
    """Starts a server and yields its environment once it is ready."""
    variables = {"SPRINT_BACKEND": "fake", "SPRINT_MODEL": uuid.uuid4().hex, **environment}
    program = Program("-m", "server", *flags, **variables)
    try:
        wait_until(lambda: "curl -s" in program.output, "the curl line", within_s=PROCESS_S)
        yield variables
    finally:
        program.process.terminate()
        program.wait_end()


def checked(*arguments: str, **environment: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "deploy/healthcheck.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    "flags",
    [
        lambda: ("--port", free_port()),
        lambda: (f"--port={free_port()}",),
        lambda: ("--port", "0"),
        lambda: ("--port", "0", "--host", "::"),
        lambda: ("--port", "0", "--host", "::1"),
        lambda: ("--port", "0", "--host", "0.0.0.0"),
        lambda: ("--port", "0", "--host", "localhost"),
        lambda: ("--port", "0", "--workers", "2"),
    ],
    ids=["flag", "one word", "free", "every address", "IPv6", "IPv4", "a name", "workers"],
)
def test_a_ready_server_is_healthy_wherever_it_listens(flags: object) -> None:
    assert callable(flags)
    with served(*flags()) as environment:
        assert checked(**environment) == (0, "")
        assert checked(**environment, **PROXIES) == (0, "")


def test_a_flag_wins_over_the_variable() -> None:
    with served("--port", free_port(), SPRINT_PORT=free_port()) as environment:
        assert checked(**environment) == (0, "")


def test_a_stopped_server_is_not_healthy() -> None:
    with served("--port", "0") as environment:
        pass
    code, error = checked(**environment, SPRINT_PORT="1")
    assert code == 1
    assert "refused" in error
