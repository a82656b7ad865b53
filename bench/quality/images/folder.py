"""A folder of images that knows what made them: manifest.json, a journal of one line an image file, and images/.

A file counts as made when the journal names it and its bytes are those; it is written whole or not at all, and once.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness.errors import BenchError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A line of the journal: an image file and what it shows. sha256 is of its bytes."""

    name: str
    prompt: str
    seeds: tuple[int, ...]
    tag: str | None
    sha256: str
    prompt_truncated: bool


class ImageFolder:
    """`root`/images, its journal and its manifest."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"
        self._journal, self._manifest = root / "images.jsonl", root / "manifest.json"

    @contextmanager
    def locked(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Within the block this process alone writes here, and `identity` is what makes the images.

        Raises BenchError where another process writes here, or the images here were made by something else.
        """
        self.images.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BenchError(
                    f"out: {self.root} is written by another process; wait for it, or name another"
                ) from error
            if self._manifest.exists():
                self._check(self.manifest()["identity"], identity)
            else:
                self._write({"format": FORMAT, "identity": dict(identity)})
            yield

    def _check(self, existing: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
        requested = json.loads(json.dumps(requested))
        names = sorted(name for name in existing.keys() | requested.keys() if existing.get(name) != requested.get(name))
        if names:
            differences = "; ".join(f"{name} was {existing.get(name)}, is now {requested.get(name)}" for name in names)
            raise BenchError(
                f"out: the images in {self.root} are made by something else: {differences}. Name another folder"
            )

    def manifest(self) -> dict[str, Any]:
        """Raises BenchError where there is none, or it is of another format."""
        try:
            entries: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(
                f"{self._manifest}: {error}; needed is a folder of `python -m bench.quality.images`"
            ) from error
        if entries.get("format") != FORMAT:
            raise BenchError(f"{self._manifest}: got format {entries.get('format')}, this version reads {FORMAT}")
        return entries

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Adds what is known at the end to the manifest."""
        self._write({**self.manifest(), **facts})

    def _write(self, document: Mapping[str, Any]) -> None:
        write_atomically(self._manifest, (json.dumps(document, indent=2) + "\n").encode())

    def add(self, entry: JournalEntry, content: bytes) -> None:
        """Writes a file, then its line. A run that is killed in between makes the file again."""
        path = self.images / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(entry)) + "\n")

    def finished(self) -> dict[str, JournalEntry]:
        """Name -> line, of the files that are there and unchanged. Raises BenchError for a damaged line."""
        entries: dict[str, JournalEntry] = {}
        lines = self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
                entry = JournalEntry(**{**values, "seeds": tuple(values["seeds"])})
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) - 1:
                    break  # cut short by a kill
                raise BenchError(f"{self._journal}: line {number + 1} is damaged ({error!r})") from error
            entries[entry.name] = entry
        return {name: entry for name, entry in entries.items() if self._is_intact(entry)}

    def _is_intact(self, entry: JournalEntry) -> bool:
        path = self.images / entry.name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256

    def compact(self) -> dict[str, JournalEntry]:
        """`made`, and a journal of just these lines, so that no name stands twice and none is cut short."""
        finished = self.finished()
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in finished.values())
        write_atomically(self._journal, text.encode())
        return finished

    def duplicate_count(self) -> int:
        """Lines of the journal beyond one for each name: files that were made twice."""
        names = [json.loads(line)["name"] for line in self._journal.read_text(encoding="utf-8").splitlines()]
        return len(names) - len(set(names))


def digest(finished: Mapping[str, JournalEntry]) -> str:
    """sha256 over names and contents: equal folders have equal digests."""
    lines = (f"{name} {finished[name].sha256}\n" for name in sorted(finished))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """The file at `path`, whole or not at all, on a file system that renames atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
