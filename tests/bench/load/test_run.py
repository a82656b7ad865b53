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

from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.prometheus_text import parse_samples
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
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["statuses"] == {"200": 40}
    assert result["lost"] == 0
    assert (result["check"]["checked"], result["check"]["wrong"]) == (40, 0)
    assert result["latency_ms"]["count"] == result["stages_ms"]["decode"]["count"] == 40
    assert 1 <= result["batch"]["mean_size"] <= 2
    assert result["engine"]["backend"] == "fake"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--concurrency", "4"],
        ["--concurrency", "4", "--requests", "9", "--rate", "3"],
        ["--rate", "3", "--seconds", "1", "--check", "fake", "--format", "jpeg"],
        ["--rate", "3", "--seconds", "1", "--url", "http://127.0.0.1:1", "--check", "rerun"],
    ],
)
def test_contradictions_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "need" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rate", "3", "--seconds", "1", "--", "--backend", "none-such"]) == 3
    assert "allowed: auto, eager" in capsys.readouterr().err


def request(seed: int = 0) -> ImageRequest:
    return ImageRequest("a red circle", seed, 1, "png", 64, 64)


def send_to(handler: Handler, send: Callable[[LoadGenerator], Awaitable[list[RequestRecord]]]) -> list[RequestRecord]:
    """Returns the records of the requests that `send` sends to a server with this handler."""

    async def run() -> list[RequestRecord]:
        handled: list[asyncio.Task[None]] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handled.append(asyncio.ensure_future(serve(reader, writer)))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        with tempfile.TemporaryFile() as spool:
            traffic = LoadGenerator(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", spool, timeout_s=5)
            records = await send(traffic)
            await traffic.close()
        server.close()
        await asyncio.gather(*handled)
        return records

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> dict[str, object]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    result: dict[str, object] = json.loads(await reader.readexactly(length))
    return result


def test_a_connection_cut_in_mid_answer_is_a_lost_request() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await read_request(reader)
        writer.write(ANSWER if body["seed"] else ANSWER[:-1])

    records = send_to(cut, lambda traffic: traffic.closed_loop([request(0), request(1), request(2)], 1))
    assert [record.status for record in records] == [0, 200, 200]
    assert "EOFError" in records[0].error
    assert records[1].stages_ms == {"queue": 0.5, "text": 2.0}


def test_open_loop_does_not_wait_for_answers() -> None:
    arrived: list[object] = []
    all_arrived = asyncio.Event()

    async def answer_all_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.append(reader)
        if len(arrived) == 5:
            all_arrived.set()
        await all_arrived.wait()  # a client that waited for its answers would never send the fifth
        writer.write(ANSWER)

    records = send_to(answer_all_at_once, lambda traffic: traffic.open_loop([request(seed) for seed in range(5)], 50.0))
    assert [record.status for record in records] == [200] * 5
    assert records[0].seconds > records[4].seconds


def test_open_loop_counts_from_the_planned_time() -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await read_request(reader))["seed"] == 0:
            time.sleep(0.3)  # blocks the generator, which shares the loop
        writer.write(ANSWER)

    records = send_to(stall, lambda traffic: traffic.open_loop([request(seed) for seed in range(5)], 50.0))
    assert max(record.send_delay_s for record in records) > 0.1
    assert all(record.seconds > record.send_delay_s for record in records)


def spooled(images: list[tuple[ImageRequest, np.ndarray]], path: Path) -> list[RequestRecord]:
    records = []
    with path.open("wb") as spool:
        for image_request, pixels in images:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            records.append(
                RequestRecord(image_request, 200, 0.1, 0.0, {}, (spool.tell(), spool.write(file.getvalue())))
            )
    return records


def test_answers_that_were_mixed_up_are_found(tmp_path: Path) -> None:
    first, second = (expected_pixels(Job("a red circle", seed, 64, 64)) for seed in (0, 1))
    records = spooled([(request(0), first), (request(1), second), (request(2), first)], tmp_path / "spool")
    with (tmp_path / "spool").open("rb") as spool:
        outcome = run_check("fake", records, spool.fileno(), (64, 64), [], 1)
    assert (outcome.checked, outcome.wrong) == (3, 1)
    assert "seed 2" in outcome.reasons[0]


def test_the_judge_reads_prompts_and_images(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 15**2
    image = np.where(disc[..., None], (220, 40, 40), (255, 255, 255)).astype(np.uint8)
    blue = ImageRequest("a blue circle", 1, 1, "png")
    records = spooled([(request(), image), (blue, image)], tmp_path / "spool")
    with (tmp_path / "spool").open("rb") as spool:
        outcome = run_check("judge", records, spool.fileno(), (64, 64), [], 1)
    assert (outcome.checked, outcome.wrong) == (2, 1)
    assert "asked: blue circle" in outcome.reasons[0]


def test_samples_of_an_exposition() -> None:
    text = '# HELP a b\n# TYPE a counter\na_total{route="/x y",status="200"} 3.0\nb 1e+06\n'
    assert parse_samples(text) == {'a_total{route="/x y",status="200"}': 3.0, "b": 1e6}
