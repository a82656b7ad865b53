"""Runs a call of the kit on the host: each step is a program with a time limit, and finished ones are skipped.

    bash run.sh http|engine|rest [--rehearse] [--minutes 4.5]

Writes to --out: acceptance.md (figures with their bars, and the steps), acceptance.json, and each program's own files
and logs. Exit code 1: a step failed, or time ended before it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.acceptance.kit.bars import Facts, show
from bench.acceptance.kit.calls import CALLS, Place, Step
from bench.acceptance.over_http.figures import Figures
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.server_process import ROOT

MINUTES = 4.5
LEAST_S = 15.0  # no step begins when a call has less left
GROUP = "group"  # file in `work`: process group of the running step
MARK = "KIT_WORK"  # variable of its environment that names `work`


class Runner:
    """Runs the steps of one call. deadline: seconds of time.monotonic() at which it ends the last step."""

    def __init__(self, place: Place, deadline: float) -> None:
        self._place, self._deadline = place, deadline
        files = {True: place.work / "built.jsonl", False: place.out / "steps.jsonl"}
        self._kept = {builds: Figures(file, deadline - LEAST_S, time.monotonic) for builds, file in files.items()}
        told = place.out / "acceptance.json"
        self.skipped: dict[str, str] = json.loads(told.read_text())["skipped"] if told.exists() else {}
        (place.out / "logs").mkdir(parents=True, exist_ok=True)
        self._end_group()

    @property
    def left_out(self) -> int:
        return sum(kept.left_out for kept in self._kept.values())

    def run(self, step: Step) -> None:
        """Runs `step`, unless it is done or lacks something that it needs, and records its failure."""
        lacks = step.lacks(self._place)
        if lacks is not None:
            self.skipped[step.name] = lacks
            return
        self.skipped.pop(step.name, None)
        self._kept[step.builds].take({"device": self._place.device}, step.name, lambda: self._ran(step))

    def _ran(self, step: Step) -> dict[str, Any]:
        """Runs the program and returns its JSON and seconds. Raises BenchError with its last line."""
        limit = min(step.limit_s * self._place.patience, self._deadline - time.monotonic())
        stem = self._place.out / "logs" / re.sub(r"\W+", "-", step.name)
        began = time.monotonic()
        with stem.with_suffix(".out").open("wb") as out, stem.with_suffix(".log").open("wb") as log:
            own = {**os.environ, MARK: str(self._place.work)}
            process = subprocess.Popen(step.command, cwd=ROOT, env=own, stdout=out, stderr=log, start_new_session=True)
            (self._place.work / GROUP).write_text(f"{process.pid}\n")
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise BenchError(f"not done after {limit:.0f} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                (self._place.work / GROUP).unlink()
        if code:
            raise BenchError(f"code {code}: {_last_line(stem)}")
        return {"seconds": round(time.monotonic() - began, 1), "found": _document(stem.with_suffix(".out").read_text())}

    def _end_group(self) -> None:
        """Ends processes of a step that an earlier, killed call left behind."""
        file = self._place.work / GROUP
        if not file.exists():
            return
        group = int(file.read_text() or 0)
        if group and any(_is_ours(path, group, self._place.work) for path in Path("/proc").glob("[0-9]*")):
            os.killpg(group, signal.SIGKILL)
        file.unlink()


def _is_ours(process: Path, group: int, work: Path) -> bool:
    """Returns whether a process of /proc is of this group and has `work` in its environment: group ids are reused."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return int(fields[2]) == group and f"{MARK}={work}\0".encode() in (process / "environ").read_bytes()
    except (OSError, IndexError):
        return False


def _document(text: str) -> Any:
    """Returns the JSON of the whole `text` or of its last line; None where neither is JSON."""
    lines = text.strip().splitlines()
    for part in (text, lines[-1] if lines else ""):
        try:
            found = json.loads(part)
        except ValueError:
            continue
        if isinstance(found, dict):
            found.pop("shared", None)  # hundreds of kernel files in an engine's manifest
        return found
    return None


def _last_line(stem: Path) -> str:
    for suffix in (".log", ".out"):
        lines = stem.with_suffix(suffix).read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1][:300]
    return "no word"


def _card(place: Place) -> str:
    return "a CPU (rehearsal)" if place.rehearsal else torch.cuda.get_device_name()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bash run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=tuple(CALLS))
    parser.add_argument("--rehearse", action="store_true", help="the tiny checkpoint on this machine's CPU")
    parser.add_argument("--minutes", type=float, help="after which all is ended (default 4.5; a rehearsal 18)")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that the call has taken already")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is built")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found")
    options = parser.parse_args(argv)
    place = Place(options.work.absolute(), options.out.absolute(), options.rehearse)
    if not place.rehearsal and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs what a CPU can")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    minutes = MINUTES * place.patience if options.minutes is None else options.minutes
    runner = Runner(place, time.monotonic() + minutes * 60 - options.spent)
    for step in CALLS[options.call](place):
        runner.run(step)
        keep(place, runner.skipped)
    print((place.out / "acceptance.md").read_text())
    return int(runner.left_out > 0)


def keep(place: Place, skipped: dict[str, str]) -> None:
    """Writes acceptance.md and acceptance.json of all calls so far."""
    facts = Facts.read(place.out, place.work)
    about = {"card": _card(place), "machine": host_facts(), "skipped": skipped}
    (place.out / "acceptance.json").write_text(json.dumps({**about, **facts.to_dict()}) + "\n")
    (place.out / "acceptance.md").write_text(show(facts, place.models, about, held=not place.rehearsal))


if __name__ == "__main__":
    sys.exit(main())
