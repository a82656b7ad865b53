"""Figures as JSON lines: each is printed and written at once, and the next call skips it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.host import host_facts

About = dict[str, Any]  # what a figure holds for: model, precision, device


class Figures:
    """The lines of one file. deadline: seconds of `clock` after which no measurement begins."""

    def __init__(self, path: Path, deadline: float, clock: Callable[[], float]):
        self._path, self._deadline, self._clock = path, deadline, clock
        self._done: set[str] = set()
        self.left_out = 0
        self._machine = host_facts()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                if "error" not in found and found["machine"]["revision"] == self._machine["revision"]:
                    self._done.add(_key(found["about"], found["name"]))

    def has(self, about: About, name: str) -> bool:
        return _key(about, name) in self._done

    def take(self, about: About, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures `name`, unless the file has it or time is up; writes an exception as its error."""
        if self.has(about, name):
            return
        if self.late:
            self.left_out += 1
            return
        try:
            found = measure()
        except Exception as error:  # it is the figure's outcome
            self.fail(about, name, error)
            return
        self._write(about, name, found)
        self._done.add(_key(about, name))

    @property
    def late(self) -> bool:
        return self._clock() > self._deadline

    def fail(self, about: About, name: str, error: Exception) -> None:
        """Writes the error; the next call retries."""
        self._write(about, name, {"error": f"{type(error).__name__}: {error}"[:4000]})
        self.left_out += 1

    def _write(self, about: About, name: str, found: dict[str, Any]) -> None:
        line = json.dumps({"name": name, "about": about, **found, "machine": self._machine})
        print(line, flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _key(about: About, name: str) -> str:
    return json.dumps([name, about], sort_keys=True)
