"""Seeded nonsense for a real server: image files, requests and websocket frames; and schemathesis, where it is given.

    python -m bench.robustness.fuzz --images 5000 --requests 3000 --sessions 1000 --offers 1000
    python -m bench.robustness.fuzz --schemathesis .venvs/fuzz/bin/schemathesis --examples 1000

No answer may be 5xx, no picture refused that is one, nothing fail inside, and nothing grow: memory, files, threads.
Prints a table, then one JSON document as the last line. Exit code 1 where any of that is not so.
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness.cli import command
from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.harness.load_generator import FORMATS
from bench.harness.summary import table
from bench.robustness.malformed_images import bad_image
from bench.robustness.malformed_requests import bad_frame, bad_request, bad_sdapi, handshake
from bench.robustness.offers import offer_case
from bench.robustness.restarting_server import Supervisor

TOGETHER = 8
PATIENCE_S = 60.0
SETTLE_S = 5.0
MEMORY_GROWTH = 0.1  # a series of metrics for each size that was asked for is no leak
QUIET_S = 0.3  # what a raw connection waits for more, before it leaves
FRAMES = 12  # of a session, at most
WARMUP_SHARE = 0.25  # of the cases: what is loaded and cached for good is loaded and cached then
FLAGS = (
    *("--backend", "fake", "--log-format", "json", "--max-queue", "512", "--body-timeout-s", "0.5"),
    *("--compat", "sdapi"),
)
# Every check that holds for any server; positive_data_acceptance does not, since most strings are no image.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method"
)
# A deadline of 1 ms is theirs to ask for, and 504 the answer to it.
SCHEMATHESIS = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
Case = Callable[[Supervisor, random.Random], Awaitable[str]]
SIZE = {"prompt": "x", "width": 64, "height": 64, "seed": 1}
LARGEST = {**SIZE, "width": 2048, "height": 2048}  # that the fake engine makes


@dataclass(frozen=True, slots=True)
class Campaign:
    """`growth`: of memory, as a share, files and threads, from the end of the warm-up to the end."""

    name: str
    cases: int
    seen: dict[str, int]
    growth: dict[str, float]
    wrong: dict[str, int]


async def image_case(server: Supervisor, rng: random.Random) -> str:
    """An odd file as `image`, `control_image`, or in a form."""
    kind, content, fate = bad_image(rng)
    way = rng.choice(("image", "control_image", "edit"))
    if way == "edit":
        parts = [f'--b\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in SIZE.items()]
        parts.append(b'--b\r\ncontent-disposition: form-data; name="image"; filename="../x.png"\r\n\r\n' + content)
        body, media_type = b"".join(parts) + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
        answer = await server.exchange("POST", "/v1/images/edits", body, media_type)
    else:
        text = base64.b64encode(content).decode()
        body = json.dumps({**SIZE, way: text if rng.random() < 0.7 else f"data:image/png;base64,{text}"}).encode()
        answer = await server.exchange("POST", "/generate", body)
    allowed = {"read": (200,), "refused": (422,), "either": (200, 422)}[fate]
    return str(answer.status) if answer.status in allowed else f"wrong: {answer.status} for {kind} as {way}"


async def request_case(server: Supervisor, rng: random.Random) -> str:
    """A head that may be none; whatever comes back is HTTP, and no failure."""
    received = await _raw(server, [bad_request(rng)])
    if not received:
        return "closed without an answer"
    found = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", received)
    status = int(found.group(1)) if found else 0
    # 503 is what a websocket's handshake gets where there is no place; 504 may be asked for.
    return f"{status}" if 100 <= status < 500 else f"wrong: {received[:60]!r}"


async def sdapi_case(server: Supervisor, rng: random.Random) -> str:
    """Odd fields of AUTOMATIC1111's API: images, or a sentence that names the field."""
    path, body = bad_sdapi(rng)
    answer = await server.exchange("POST", path, body)
    if answer.status == 422 and not json.loads(answer.body)["errors"]:
        return "wrong: 422 that names no field"
    return str(answer.status) if answer.status in (200, 422) else f"wrong: {answer.status} for {body[:60]!r}"


async def session_case(server: Supervisor, rng: random.Random) -> str:
    """A live session of a few frames, most of them bad; some clients send them without waiting for the handshake."""
    hello, frames = handshake(rng, server.port), [bad_frame(rng) for _ in range(rng.randrange(1, FRAMES))]
    if rng.random() < 0.2:
        received = await _raw(server, [hello, *frames], first_s=PATIENCE_S)
        if not received:
            return "closed before the handshake"
    else:
        received = await _raw(server, frames, hello)
    if not received.startswith(b"HTTP/1.1 101"):
        return f"wrong: {received[:60]!r}"
    kinds = sorted(set(re.findall(rb'"type":"(\w+)"', received)))
    return b" and ".join(kinds).decode() or "closed before the greeting"


async def _raw(server: Supervisor, parts: Sequence[bytes], hello: bytes = b"", first_s: float = QUIET_S) -> bytes:
    """What comes back for these bytes, until the server closes or says nothing for a while (`first_s`: at first).

    `hello` goes ahead, and is answered with a head before the rest is sent.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    received = b""
    with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
        if hello:
            writer.write(hello)
            received = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        for part in parts:
            writer.write(part)
            await asyncio.wait_for(writer.drain(), PATIENCE_S)
        while more := await asyncio.wait_for(reader.read(2**16), QUIET_S if received else first_s):
            received += more
    writer.transport.abort()
    return received


async def run(name: str, case: Case, cases: int, server: Supervisor, seed: int) -> Campaign:
    """`cases` of them, a few at a time; every case has a seed of its own."""
    seen: Counter[str] = Counter()
    numbers = iter(range(cases))

    async def worker(until: int) -> None:
        for number in numbers:
            try:
                one = asyncio.wait_for(case(server, random.Random(f"{seed} {name} {number}")), PATIENCE_S)
                seen[await one] += 1
            except (OSError, EOFError, BenchError) as error:
                seen[f"wrong: case {number}: {type(error).__name__} {error}"] += 1
            if number >= until:
                return

    warm = int(cases * WARMUP_SHARE)
    await asyncio.gather(*(worker(warm) for _ in range(TOGETHER)))
    before = await state(server)
    await asyncio.gather(*(worker(cases) for _ in range(TOGETHER)))
    wrong = {label: count for label, count in seen.items() if label.startswith("wrong")}
    return Campaign(
        name, sum(seen.values()), dict(sorted(seen.items())), await growth(server, before), wrong | await faults(server)
    )


async def schemathesis(program: str, examples: int, server: Supervisor, seed: int) -> Campaign:
    """The program's own run against /openapi.json, after the largest orders, and a part of one with another seed."""
    await fill(server)
    settings = server.log.with_suffix(".toml")
    settings.write_text(SCHEMATHESIS)
    warm = [
        str(Path(program).absolute()),
        "--config-file",
        str(settings),
        "run",
        f"http://127.0.0.1:{server.port}/openapi.json",
    ]
    warm += ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
    part = max(1, int(examples * WARMUP_SHARE))
    await _said(settings.parent, *warm, "--seed", str(seed + 1), "--max-examples", str(part))
    before = await state(server)
    code, said = await _said(settings.parent, *warm, "--seed", str(seed), "--max-examples", str(examples))
    print(said, file=sys.stderr)
    found = re.search(r"(\d+) generated", said)
    seen = {f"exit code {code}": 1}
    wrong = await faults(server) | (seen if code else {})
    return Campaign("schemathesis", int(found.group(1)) if found else 0, seen, await growth(server, before), wrong)


async def fill(server: Supervisor) -> None:
    """The largest pictures in every format, twice, a batch of them at once: memory that is taken once and kept.

    Without it, growth says which of the cases happened to ask for larger pictures than those before.
    """
    for kind in FORMATS * 2:
        body = json.dumps({**LARGEST, "output_format": kind}).encode()
        for answer in await asyncio.gather(*(server.exchange("POST", "/generate", body) for _ in range(TOGETHER))):
            if answer.status != 200:
                raise BenchError(f"the largest picture, as {kind}: got {answer.status}, needed 200")


async def _said(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Exit code and output of a program that may write into `folder`."""
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, cwd=folder)
    said = (await process.communicate())[0].decode()
    return process.returncode, said


async def state(server: Supervisor) -> dict[str, float]:
    """Memory in bytes, open files, threads."""
    samples = await server.samples()
    found = re.search(r"^Threads:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    assert found
    memory, files = samples["process_resident_memory_bytes"], samples["process_open_fds"]
    return {"memory": memory, "files": files, "threads": float(found.group(1))}


async def growth(server: Supervisor, before: dict[str, float]) -> dict[str, float]:
    """Since `before`, once our connections are closed there too."""
    end = time.monotonic() + SETTLE_S
    while (after := await state(server))["files"] > before["files"] and time.monotonic() < end:
        await asyncio.sleep(0.05)
    grown = {name: after[name] - before[name] for name in ("files", "threads")}
    return {"memory": round(after["memory"] / before["memory"] - 1, 4), **grown}


async def faults(server: Supervisor) -> dict[str, int]:
    """What the server counts and logs of failures of its own, and whether it is still the one that was started."""
    samples = await server.samples()
    failed = {
        name: int(value)
        for name, value in samples.items()
        if value and (re.search(r'status="5(00|02)"|reason="failed"', name) or "engine_failures" in name)
    }
    if traces := server.log.read_text(errors="replace").count("Traceback"):
        failed["tracebacks in the log"] = traces
    if server.codes:
        failed[f"left with {server.codes}"] = len(server.codes)
    return failed


CASES: dict[str, Case] = {
    "images": image_case,
    "requests": request_case,
    "sdapi": sdapi_case,
    "sessions": session_case,
    "offers": offer_case,
}


async def campaigns(options: argparse.Namespace, folder: Path) -> list[Campaign]:
    """Each on a server of its own."""
    found = []
    for name in (*CASES, "schemathesis"):
        cases = options.examples if name == "schemathesis" else getattr(options, name)
        if not cases or (name == "schemathesis" and not options.schemathesis):
            continue
        server = Supervisor(FLAGS, folder / f"{name}.log")
        await server.start()
        try:
            if name in CASES:
                found.append(await run(name, CASES[name], cases, server, options.seed))
            else:
                found.append(await schemathesis(options.schemathesis, cases, server, options.seed))
        finally:
            code = await server.stop()
        if code:
            found[-1].wrong[f"exit code {code} after SIGTERM"] = 1
        if options.keep_logs:
            (options.keep_logs / f"{name}.log").write_bytes(server.log.read_bytes())
    return found


def is_clean(one: Campaign) -> bool:
    grown = one.growth
    return not one.wrong and grown["memory"] < MEMORY_GROWTH and grown["files"] <= 0 and grown["threads"] <= 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.robustness.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=0, help="odd image files")
    parser.add_argument("--requests", type=int, default=0, help="odd heads and bodies")
    parser.add_argument("--sdapi", type=int, default=0, help="odd bodies of AUTOMATIC1111's API")
    parser.add_argument("--sessions", type=int, default=0, help="live sessions of odd frames")
    parser.add_argument("--offers", type=int, default=0, help="requests that offer another protocol")
    parser.add_argument("--schemathesis", help="the program, for cases from /openapi.json")
    parser.add_argument("--examples", type=int, default=1000, help="of schemathesis, for each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-logs", type=Path, metavar="FOLDER", help="where to leave the servers' logs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = asyncio.run(campaigns(options, Path(folder)))
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
    head = ("campaign", "cases", "answers", "memory growth", "files", "threads", "wrong (must be none)")
    rows = []
    for one in found:
        grown = (f"{one.growth['memory']:.2%}", one.growth["files"], one.growth["threads"])
        rows.append([one.name, one.cases, _counted(one.seen), *grown, _counted(one.wrong) or "none"])
    print(table(head, rows))
    document = {
        "program": "bench.robustness.fuzz",
        "command": command("bench.robustness.fuzz", arguments),
        "machine": machine(),
    }
    print(json.dumps({**document, "campaigns": [asdict(one) for one in found]}))
    return int(not all(map(is_clean, found)))


def _counted(labels: dict[str, int]) -> str:
    return ", ".join(f"{label} x{count}" for label, count in Counter(labels).most_common(12))


if __name__ == "__main__":
    sys.exit(main())
