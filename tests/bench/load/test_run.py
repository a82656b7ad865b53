"""bench.load against the real server, and against servers that stall, cut connections or mix answers up."""

import asyncio
import io
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.harness.load_generator import Order, Record, Traffic
from bench.harness.prometheus_text import samples
from bench.load.__main__ import main
from bench.load.image_checks import run_check
from engines.fake import expected_pixels
from engines.types import Job

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\nServer-Timing: queue;dur=0.5, text;dur=2\r\n\r\nok"
)


def test_a_run_on_the_fake_engine_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--concurrency", "4", "--requests", "40", "--size", "64x64", "--check", "fake", "--warmup", "4"]
    assert main([*load, "--", "--backend", "fake", "--max-batch", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["statuses"] == {"200": 40}
    assert found["lost"] == 0
    assert (found["check"]["checked"], found["check"]["wrong"]) == (40, 0)
    assert found["latency_ms"]["count"] == found["stages_ms"]["decode"]["count"] == 40
    assert 1 <= found["batch"]["mean_size"] <= 2
    assert found["engine"]["backend"] == "fake"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--concurrency", "4"],
        ["--concurrency", "4", "--requests", "9", "--rate", "3"],
        ["--rate", "3", "--seconds", "1", "--check", "fake", "--format", "jpeg"],
        ["--rate", "3", "--seconds", "1", "--url", "http://127.0.0.1:1", "--check", "alone"],
    ],
)
def test_contradictions_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "need" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rate", "3", "--seconds", "1", "--", "--backend", "none-such"]) == 3
    assert "allowed: auto, eager" in capsys.readouterr().err


def order(seed: int = 0) -> Order:
    return Order("a red circle", seed, 1, "png", 64, 64)


def sent(handler: Handler, send: Callable[[Traffic], Awaitable[list[Record]]]) -> list[Record]:
    """What becomes of the orders that `send` sends to a server of one handler."""

    async def run() -> list[Record]:
        handled: list[asyncio.Task[None]] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handled.append(asyncio.ensure_future(serve(reader, writer)))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        with tempfile.TemporaryFile() as spool:
            traffic = Traffic(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", spool, patience_s=5)
            records = await send(traffic)
            await traffic.close()
        server.close()
        await asyncio.gather(*handled)
        return records

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> dict[str, object]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    found: dict[str, object] = json.loads(await reader.readexactly(length))
    return found


def test_a_connection_cut_in_mid_answer_is_a_lost_request() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await read_request(reader)
        writer.write(ANSWER if body["seed"] else ANSWER[:-1])

    records = sent(cut, lambda traffic: traffic.closed_loop([order(0), order(1), order(2)], 1))
    assert [record.status for record in records] == [0, 200, 200]
    assert "IncompleteReadError" in records[0].error
    assert records[1].stages_ms == {"queue": 0.5, "text": 2.0}


def test_open_loop_does_not_wait_for_answers() -> None:
    arrived: list[object] = []
    everyone = asyncio.Event()

    async def answer_all_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.append(reader)
        if len(arrived) == 5:
            everyone.set()
        await everyone.wait()  # a client that waited for its answers would never send the fifth
        writer.write(ANSWER)

    records = sent(answer_all_at_once, lambda traffic: traffic.open_loop([order(seed) for seed in range(5)], 50.0))
    assert [record.status for record in records] == [200] * 5
    assert records[0].seconds > records[4].seconds


def test_open_loop_counts_from_the_planned_time() -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await read_request(reader))["seed"] == 0:
            time.sleep(0.3)  # the generator, on the same loop, cannot send what is due meanwhile
        writer.write(ANSWER)

    records = sent(stall, lambda traffic: traffic.open_loop([order(seed) for seed in range(5)], 50.0))
    assert max(record.late for record in records) > 0.1
    assert all(record.seconds > record.late for record in records)


def spooled(pictures: list[tuple[Order, np.ndarray]], path: Path) -> list[Record]:
    records = []
    with path.open("wb") as spool:
        for asked, pixels in pictures:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            records.append(Record(asked, 200, 0.1, 0.0, {}, (spool.tell(), spool.write(file.getvalue()))))
    return records


def test_answers_that_were_mixed_up_are_found(tmp_path: Path) -> None:
    one, other = (expected_pixels(Job("a red circle", seed, 64, 64)) for seed in (0, 1))
    records = spooled([(order(0), one), (order(1), other), (order(2), one)], tmp_path / "spool")
    with (tmp_path / "spool").open("rb") as spool:
        outcome = run_check("fake", records, spool.fileno(), (64, 64), [], 1)
    assert (outcome.checked, outcome.wrong) == (3, 1)
    assert "seed 2" in outcome.reasons[0]


def test_the_judge_reads_prompts_and_pictures(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 15**2
    picture = np.where(disc[..., None], (220, 40, 40), (255, 255, 255)).astype(np.uint8)
    blue = Order("a blue circle", 1, 1, "png")
    records = spooled([(order(), picture), (blue, picture)], tmp_path / "spool")
    with (tmp_path / "spool").open("rb") as spool:
        outcome = run_check("judge", records, spool.fileno(), (64, 64), [], 1)
    assert (outcome.checked, outcome.wrong) == (2, 1)
    assert "asked: blue circle" in outcome.reasons[0]


def test_samples_of_an_exposition() -> None:
    text = '# HELP a b\n# TYPE a counter\na_total{route="/x y",status="200"} 3.0\nb 1e+06\n'
    assert samples(text) == {'a_total{route="/x y",status="200"}': 3.0, "b": 1e6}
