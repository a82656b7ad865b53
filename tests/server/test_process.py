"""python -m server as a process: its output, its end and its exit codes."""

import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from program import Server
from running_server import PATIENCE_S, wait_until

from server.errors import EXIT_HANG, EXIT_SETTINGS, EXIT_START

Launch = Callable[..., Server]


@pytest.fixture
def launch() -> Iterator[Launch]:
    programs: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        programs.append(Server(*arguments, **environment))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
        program.wait_end()


def test_the_printed_curl_line_works_and_sigterm_answers_what_was_accepted(launch: Launch, tmp_path: Path) -> None:
    program = launch(
        "--backend",
        "fake",
        "--log-format",
        "json",
        SPRINT_FAKE_DELAY_MS="300",
        SPRINT_MAX_BATCH="1",
        SPRINT_DRAIN_DELAY_S="4",
    )
    url = program.wait_ready()
    (command,) = re.findall(r"^curl .*$", program.output, re.MULTILINE)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    answers: list[int] = []
    body = {"prompt": "x", "width": 64, "height": 64}

    def ask() -> None:
        answers.append(httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()

    def accepted() -> float:
        gauges = dict(re.findall(r"^(sana_sprint_jobs_\w+) (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE))
        return len(answers) + sum(float(gauges[f"sana_sprint_jobs_{state}"]) for state in ("waiting", "running"))

    wait_until(lambda: accepted() >= 4, "four accepted jobs")
    program.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
    refused = httpx.post(f"{url}/generate", json=body)
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == [200] * 4
    assert program.wait_end() == 0, program.output
    assert "Traceback" not in program.output


def test_a_hang_ends_the_process_with_its_code(launch: Launch) -> None:
    program = launch("--backend", "fake", "--batch-timeout-s", "0.2")
    url = program.wait_ready()
    body = {"prompt": "[[hang]]", "width": 64, "height": 64}
    answer = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 500
    assert httpx.get(f"{url}/health/ready").status_code == 503
    assert program.wait_end() == EXIT_HANG
    assert "leaving with exit code 70" in program.output


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"SPRINT_PROT": "1"}, "error: SPRINT_PROT='1': unknown setting; did you mean SPRINT_PORT?"),
        (["--api-key-file", "no/such/file"], {}, "error: --api-key-file no/such/file: cannot be read"),
    ],
)
def test_bad_settings_stop_the_start(
    launch: Launch, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    program = launch(*arguments, **environment)
    assert program.wait_end() == EXIT_SETTINGS
    assert words in program.output
    assert "Traceback" not in program.output


def test_a_checkpoint_that_is_none_stops_the_start_in_one_line(launch: Launch, tmp_path: Path) -> None:
    program = launch("--model", str(tmp_path))
    assert program.wait_end() == EXIT_START, program.output
    assert "cannot start" in program.output
    assert str(tmp_path) in program.output
    assert "Traceback" not in program.output


def test_a_gpu_that_is_not_there_stops_the_start_in_one_line(launch: Launch) -> None:
    program = launch("--model", "tiny", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert program.wait_end() == EXIT_START, program.output
    assert "cannot start: device: got 'cuda', but torch" in program.output
    assert "Traceback" not in program.output
