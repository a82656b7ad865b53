"""Sends seeded malformed images, requests and websocket frames to a real server, and runs schemathesis if given.

    python -m bench.robustness.fuzz --images 5000 --requests 3000 --sessions 1000 --offers 1000
    python -m bench.robustness.fuzz --schemathesis .venvs/fuzz/bin/schemathesis --examples 1000

No response may be 5xx, no valid image refused, nothing may fail inside, and memory, files and threads must not grow.
Prints a table, then one JSON document as the last line. Exit code 1: one of these does not hold.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.load_generator import FORMATS
from bench.harness.summary import counted, table
from bench.robustness.malformed_images import bad_image
from bench.robustness.malformed_requests import bad_frame, bad_request, bad_sdapi, handshake, options_case
from bench.robustness.restarting_server import RestartingServer
from bench.robustness.upgrade_requests import upgrade_case

CONCURRENCY = 8
TIMEOUT_S = 60.0
SETTLE_S = 5.0
GROWTH_CASES = 500  # fewer say nothing of growth
MEMORY_GROWTH = 0.1  # a metric series for each requested size is no leak
IDLE_S = 0.3  # a raw connection waits so long for more bytes
FRAMES = 12  # of a session, at most
WARMUP_SHARE = 0.25  # of the cases; permanent caches fill meanwhile
FLAGS = (
    *("--backend", "fake", "--log-format", "json", "--max-queue", "512", "--body-timeout-s", "0.5"),
    *("--compat", "sdapi", "--model", "one", "--model", "two", "--fast-decoder", "lite"),
    *("--lora", "one:ring=none", "--lora", "one:night=none"),
)
# Every check that holds for any server; positive_data_acceptance does not, since most strings are no image.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method"
)
# A client may set a deadline of 1 ms, which gets 504.
SCHEMATHESIS = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
Case = Callable[[RestartingServer, random.Random], Awaitable[str]]
SIZE = {"prompt": "x", "width": 64, "height": 64, "seed": 1}
LARGEST = {**SIZE, "width": 2048, "height": 2048}  # that the fake engine makes


@dataclass(frozen=True, slots=True)
class Campaign:
    """`growth`: of memory (a share), files and threads, from the end of the warm-up to the end."""

    name: str
    cases: int
    seen: dict[str, int]
    growth: dict[str, float]
    wrong: dict[str, int]


async def image_case(server: RestartingServer, rng: random.Random) -> str:
    """Sends an odd file as `image`, `control_image`, or in a form."""
    image_kind, content, expected = bad_image(rng)
    field = rng.choice(("image", "control_image", "edit"))
    if field == "edit":
        parts = [f'--b\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in SIZE.items()]
        parts.append(b'--b\r\ncontent-disposition: form-data; name="image"; filename="../x.png"\r\n\r\n' + content)
        body, media_type = b"".join(parts) + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
        response = await server.exchange("POST", "/v1/images/edits", body, media_type)
    else:
        text = base64.b64encode(content).decode()
        body = json.dumps({**SIZE, field: text if rng.random() < 0.7 else f"data:image/png;base64,{text}"}).encode()
        response = await server.exchange("POST", "/generate", body)
    allowed = {"read": (200,), "refused": (422,), "either": (200, 422)}[expected]
    return (
        str(response.status) if response.status in allowed else f"wrong: {response.status} for {image_kind} as {field}"
    )


async def request_case(server: RestartingServer, rng: random.Random) -> str:
    """Sends a possibly invalid request; the response must be HTTP and no server error."""
    received = await _send_raw(server, [bad_request(rng)])
    if not received:
        return "closed without an answer"
    match = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", received)
    status = int(match.group(1)) if match else 0
    # A websocket handshake gets 503 without a free session; a request may ask for 504 by its timeout.
    return f"{status}" if 100 <= status < 500 else f"wrong: {received[:60]!r}"


async def sdapi_case(server: RestartingServer, rng: random.Random) -> str:
    """Sends odd fields to AUTOMATIC1111's API; expects images, or a 422 that names the field."""
    path, body = bad_sdapi(rng)
    response = await server.exchange("POST", path, body)
    if response.status == 422 and not json.loads(response.body)["errors"]:
        return "wrong: 422 that names no field"
    return str(response.status) if response.status in (200, 422) else f"wrong: {response.status} for {body[:60]!r}"


async def session_case(server: RestartingServer, rng: random.Random) -> str:
    """Opens a live session with a few frames, most of them bad; some clients do not wait for the handshake."""
    handshake_request, frames = handshake(rng, server.port), [bad_frame(rng) for _ in range(rng.randrange(1, FRAMES))]
    if rng.random() < 0.2:
        received = await _send_raw(server, [handshake_request, *frames], first_s=TIMEOUT_S)
        if not received:
            return "closed before the handshake"
    else:
        received = await _send_raw(server, frames, handshake_request)
    if not received.startswith(b"HTTP/1.1 101"):
        return f"wrong: {received[:60]!r}"
    kinds = sorted(set(re.findall(rb'"type":"(\w+)"', received)))
    return b" and ".join(kinds).decode() or "closed before the greeting"


async def _send_raw(
    server: RestartingServer, parts: Sequence[bytes], handshake_request: bytes = b"", first_s: float = IDLE_S
) -> bytes:
    """Returns what comes back, until the server closes or is silent for a while (`first_s`: at first).

    `handshake_request` is sent first, and its response head is read before the rest is sent.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    received = b""
    with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
        if handshake_request:
            writer.write(handshake_request)
            received = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
        for part in parts:
            writer.write(part)
            await asyncio.wait_for(writer.drain(), TIMEOUT_S)
        while more := await asyncio.wait_for(reader.read(2**16), IDLE_S if received else first_s):
            received += more
    writer.transport.abort()
    return received


async def run(name: str, case: Case, cases: int, server: RestartingServer, seed: int) -> Campaign:
    """Runs `cases` cases, a few at a time, each with its own seed."""
    outcomes: Counter[str] = Counter()
    numbers = iter(range(cases))

    async def worker(until: int) -> None:
        for number in numbers:
            try:
                attempt = asyncio.wait_for(case(server, random.Random(f"{seed} {name} {number}")), TIMEOUT_S)
                outcomes[await attempt] += 1
            except (OSError, EOFError, BenchError) as error:
                outcomes[f"wrong: case {number}: {type(error).__name__} {error}"] += 1
            if number >= until:
                return

    warm = int(cases * WARMUP_SHARE)
    await asyncio.gather(*(worker(warm) for _ in range(CONCURRENCY)))
    before = await resources(server)
    await asyncio.gather(*(worker(cases) for _ in range(CONCURRENCY)))
    wrong = {label: count for label, count in outcomes.items() if label.startswith("wrong")}
    return Campaign(
        name,
        sum(outcomes.values()),
        dict(sorted(outcomes.items())),
        await resource_growth(server, before),
        wrong | await server_failures(server),
    )


async def schemathesis(program: str, examples: int, server: RestartingServer, seed: int) -> Campaign:
    """Runs the program against /openapi.json, after a shorter run with another seed."""
    settings = server.log.with_suffix(".toml")
    settings.write_text(SCHEMATHESIS)
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    arguments = [str(Path(program).absolute()), "--config-file", str(settings), "run", url]
    arguments += ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
    part = max(1, int(examples * WARMUP_SHARE))
    await _run_program(settings.parent, *arguments, "--seed", str(seed + 1), "--max-examples", str(part))
    before = await resources(server)
    code, output = await _run_program(settings.parent, *arguments, "--seed", str(seed), "--max-examples", str(examples))
    print(output, file=sys.stderr)
    match = re.search(r"(\d+) generated", output)
    outcomes = {f"exit code {code}": 1}
    wrong = await server_failures(server) | (outcomes if code else {})
    return Campaign(
        "schemathesis", int(match.group(1)) if match else 0, outcomes, await resource_growth(server, before), wrong
    )


async def warm_up(server: RestartingServer) -> None:
    """Requests batches of the largest images in every format, twice, so that what is kept for good is taken first.

    Without it, growth would tell which cases happened to need larger images, or one more codec thread, than others.
    """
    for image_kind in FORMATS * 2:
        body = json.dumps({**LARGEST, "output_format": image_kind}).encode()
        for response in await asyncio.gather(*(server.exchange("POST", "/generate", body) for _ in range(CONCURRENCY))):
            if response.status != 200:
                raise BenchError(f"the largest image, as {image_kind}: got {response.status}, needed 200")


async def _run_program(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Returns exit code and output of a program that may write into `folder`."""
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, cwd=folder)
    output = (await process.communicate())[0].decode()
    return process.returncode, output


async def resources(server: RestartingServer) -> dict[str, float]:
    """Returns memory in bytes, open files and threads."""
    samples = await server.metrics()
    memory, files = samples["process_resident_memory_bytes"], samples["process_open_fds"]
    return {"memory": memory, "files": files, "threads": float(psutil.Process(server.pid).num_threads())}


async def resource_growth(server: RestartingServer, before: dict[str, float]) -> dict[str, float]:
    """Returns the growth since `before`, once the server has closed our connections."""
    end = time.monotonic() + SETTLE_S
    while (after := await resources(server))["files"] > before["files"] and time.monotonic() < end:
        await asyncio.sleep(0.05)
    grown = {name: after[name] - before[name] for name in ("files", "threads")}
    return {"memory": round(after["memory"] / before["memory"] - 1, 4), **grown}


async def server_failures(server: RestartingServer) -> dict[str, int]:
    """Returns failures from the server's metrics and log, and its unexpected exits."""
    samples = await server.metrics()
    failed = {
        name: int(value)
        for name, value in samples.items()
        if value and (re.search(r'status="5(00|02)"|reason="failed"', name) or "engine_failures" in name)
    }
    if traces := server.log.read_text(errors="replace").count("Traceback"):
        failed["tracebacks in the log"] = traces
    if server.exit_codes:
        failed[f"left with {server.exit_codes}"] = len(server.exit_codes)
    return failed


CASES: dict[str, Case] = {
    "images": image_case,
    "requests": request_case,
    "sdapi": sdapi_case,
    "options": options_case,
    "sessions": session_case,
    "offers": upgrade_case,
}


async def campaigns(options: argparse.Namespace, folder: Path) -> list[Campaign]:
    """Runs each campaign on a fresh server."""
    results = []
    for name in (*CASES, "schemathesis"):
        cases = options.examples if name == "schemathesis" else getattr(options, name)
        if not cases or (name == "schemathesis" and not options.schemathesis):
            continue
        server = RestartingServer(FLAGS, folder / f"{name}.log")
        await server.start()
        try:
            if cases >= GROWTH_CASES:
                await warm_up(server)
            if name in CASES:
                results.append(await run(name, CASES[name], cases, server, options.seed))
            else:
                results.append(await schemathesis(options.schemathesis, cases, server, options.seed))
        finally:
            code = await server.stop()
        if code:
            results[-1].wrong[f"exit code {code} after SIGTERM"] = 1
        if options.keep_logs:
            (options.keep_logs / f"{name}.log").write_bytes(server.log.read_bytes())
    return results


def is_clean(campaign: Mapping[str, Any]) -> bool:
    """Returns whether nothing went wrong and nothing grew in the campaign of the JSON document."""
    growth = campaign["growth"]
    return (
        not campaign["wrong"] and growth["memory"] < MEMORY_GROWTH and growth["files"] <= 0 and growth["threads"] <= 0
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError if a server does not start or stop."""
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(campaigns(options, Path(folder)))
    document = {"program": "bench.robustness.fuzz", "command": options.command, "machine": host_facts()}
    return {**document, "campaigns": list(map(asdict, results))}


def show(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    head = ("campaign", "cases", "answers", "memory growth", "files", "threads", "wrong (must be none)")
    rows = []
    for row in result["campaigns"]:
        growth = row["growth"]
        figures = (f"{growth['memory']:.2%}", growth["files"], growth["threads"])
        rows.append(
            [row["name"], row["cases"], counted(row["seen"], 12), *figures, counted(row["wrong"], 12) or "none"]
        )
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.robustness.fuzz", __doc__)
    parser.add_argument("--images", type=int, default=0, help="odd image files")
    parser.add_argument("--requests", type=int, default=0, help="odd heads and bodies")
    parser.add_argument("--sdapi", type=int, default=0, help="odd bodies of AUTOMATIC1111's API")
    parser.add_argument("--options", type=int, default=0, help="odd decoders, aspect ratios and adapters")
    parser.add_argument("--sessions", type=int, default=0, help="live sessions of odd frames")
    parser.add_argument("--offers", type=int, default=0, help="requests that offer another protocol")
    parser.add_argument("--schemathesis", help="the program, for cases from /openapi.json")
    parser.add_argument("--examples", type=int, default=1000, help="of schemathesis, for each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-logs", type=Path, metavar="FOLDER", help="where to leave the servers' logs")
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: not all(map(is_clean, result["campaigns"])))


if __name__ == "__main__":
    sys.exit(main())
