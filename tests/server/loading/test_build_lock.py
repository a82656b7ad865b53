"""The build lock, between processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.generation.engine_source import Building
from server.loading.build_lock import build_lock

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from server.generation.engine_source import Building
from server.loading.build_lock import build_lock
with build_lock(Path(sys.argv[1]), print) as lock:
    lock.write_progress(Building("export", 25.0, 7.5))
    print("held", flush=True)
    sys.stdin.read()
"""


class EnoughError(Exception):
    """Ends the waiting."""


def test_who_waits_hears_how_far_it_is_and_a_killed_holder_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    told: list[Building | None] = []
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        def wait(building: Building | None) -> None:
            told.append(building)
            if len(told) == 2:
                raise EnoughError

        with pytest.raises(EnoughError), build_lock(path, wait):
            pass
        assert told == [Building("export", 25.0, 7.5)] * 2

        def kill(_: Building | None) -> None:
            holder.kill()
            holder.wait()

        with build_lock(path, kill):
            assert holder.returncode == -9


def test_a_child_that_inherits_it_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def give_up(_: Building | None) -> None:
        raise EnoughError

    with build_lock(path, give_up) as lock:
        command = [sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.descriptor])
    with pytest.raises(EnoughError), build_lock(path, give_up):
        pass
    child.communicate(b"\n")
    with build_lock(path, give_up):
        pass
