"""The metrics of several replicas as one text: each sample with a label `replica`, so that sums over them add up.

Processes on one host find each other's metrics behind sockets in one folder, named as the replicas. Connecting to one
yields its text. (prometheus_client's own multiprocess mode keeps neither gauges that are read at a scrape, nor info,
nor the process's own numbers.)
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

LIMIT_S = 2.0  # for one replica to answer


async def serve_exposition(path: Path, read: Callable[[], bytes]) -> asyncio.Server:
    """Serves `read()` to whoever connects to the socket at `path`, which is replaced."""
    path.unlink(missing_ok=True)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(read())
        with contextlib.suppress(OSError):  # the one who asked is gone
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, path)


async def scrape_workers(folder: Path) -> bytes:
    """What the sockets in `folder` say, merged; those that do not answer are left out."""
    paths = sorted(folder.iterdir())
    texts = await asyncio.gather(*(_scrape(path) for path in paths))
    return merge_expositions({path.name: text for path, text in zip(paths, texts, strict=True) if text})


async def _scrape(path: Path) -> bytes:
    try:
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):  # it is being started or is gone; the next scrape sees it again
        return b""


def merge_expositions(texts: Mapping[str, bytes]) -> bytes:
    """Texts in Prometheus' format, by replica, as one text in which every family stands together."""
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
    """name 1 -> name{replica="0"} 1; name{a="b"} 1 -> name{replica="0",a="b"} 1."""
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
