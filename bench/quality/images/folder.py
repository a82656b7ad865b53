"""A folder of images with their origin: manifest.json, a journal of one line per image file, and images/.

A file is finished when the journal names it with the sha256 of its bytes. Each file is written atomically, and once.
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
    """A line of the journal: an image file, its prompt and seeds. sha256 is of its bytes."""

    name: str
    prompt: str
    seeds: tuple[int, ...]
    tag: str | None
    sha256: str
    prompt_truncated: bool


class ImageFolder:
    """The images of `root`/images, with journal and manifest."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"
        self._journal, self._manifest = root / "images.jsonl", root / "manifest.json"

    @contextmanager
    def locked(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Locks the folder for this process. `identity` is the origin of the images.

        Raises BenchError if another process writes here, or the images have another origin.
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
        """Returns the manifest. Raises BenchError if it is missing or of another format."""
        try:
            document: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(
                f"{self._manifest}: {error}; needed is a folder of `python -m bench.quality.images`"
            ) from error
        if document.get("format") != FORMAT:
            raise BenchError(f"{self._manifest}: got format {document.get('format')}, this version reads {FORMAT}")
        return document

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Adds the facts of a finished run to the manifest."""
        self._write({**self.manifest(), **facts})

    def _write(self, document: Mapping[str, Any]) -> None:
        write_atomically(self._manifest, (json.dumps(document, indent=2) + "\n").encode())

    def add(self, entry: JournalEntry, content: bytes) -> None:
        """Writes a file, then its line. A run killed in between makes the file again."""
        path = self.images / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(entry)) + "\n")

    def finished(self) -> dict[str, JournalEntry]:
        """Returns name -> line of the files that exist unchanged. Raises BenchError for a damaged line."""
        entries: dict[str, JournalEntry] = {}
        lines = self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
                entry = JournalEntry(**{**values, "seeds": tuple(values["seeds"])})
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) - 1:
                    break  # cut short when the run was killed
                raise BenchError(f"{self._journal}: line {number + 1} is damaged ({error!r})") from error
            entries[entry.name] = entry
        return {name: entry for name, entry in entries.items() if self._is_intact(entry)}

    def _is_intact(self, entry: JournalEntry) -> bool:
        path = self.images / entry.name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256

    def compact(self) -> dict[str, JournalEntry]:
        """Rewrites the journal with the lines of `finished`, so that no name occurs twice."""
        finished = self.finished()
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in finished.values())
        write_atomically(self._journal, text.encode())
        return finished

    def duplicate_count(self) -> int:
        """Returns the lines beyond one for each name: files that were made twice."""
        names = [json.loads(line)["name"] for line in self._journal.read_text(encoding="utf-8").splitlines()]
        return len(names) - len(set(names))


def digest(finished: Mapping[str, JournalEntry]) -> str:
    """Returns the sha256 over names and contents, equal for equal folders."""
    lines = (f"{name} {finished[name].sha256}\n" for name in sorted(finished))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file and renames it to `path`."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
