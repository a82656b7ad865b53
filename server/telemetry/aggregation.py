"""Merges the metrics of several replicas into one text. Each sample gets a label `replica`, so sums over them add up.

Processes on one host serve their metrics on sockets in one folder, named by replica; a connection yields the text.
prometheus_client's multiprocess mode supports neither gauges read at a scrape, nor Info, nor process metrics. Its
parser takes 30 to 50 times as long (docs/understand/decisions/0015-settings-and-metrics-by-hand.md).
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

SCRAPE_TIMEOUT_S = 2.0  # per replica


async def serve_exposition(path: Path, read: Callable[[], bytes]) -> asyncio.Server:
    """Serves `read()` on a Unix socket at `path`; replaces an existing one."""
    path.unlink(missing_ok=True)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(read())
        with contextlib.suppress(OSError):  # the client disconnected
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, path)


async def scrape_workers(folder: Path) -> bytes:
    """Returns the merged metrics of the sockets in `folder`; omits those that do not answer."""
    paths = sorted(folder.iterdir())
    texts = await asyncio.gather(*(_scrape(path) for path in paths))
    return merge_expositions({path.name: text for path, text in zip(paths, texts, strict=True) if text})


async def _scrape(path: Path) -> bytes:
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):  # it is starting or has ended; the next scrape retries
        return b""


def merge_expositions(texts: Mapping[str, bytes]) -> bytes:
    """Merges texts in Prometheus' format, by replica, into one text with each family once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.decode().splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    families = {family: [*head, *samples.get(family, [])] for family, head in heads.items()}
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()


def _labelled(sample: str, replica: str) -> str:
    """Adds the label: name 1 -> name{replica="0"} 1; name{a="b"} 1 -> name{replica="0",a="b"} 1."""
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
