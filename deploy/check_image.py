"""Proves an image by running it: who it runs as, what it may write, that it answers, drains, builds an engine onto its
volume and serves it from there after a restart.

    python deploy/check_image.py --image NAME [--container podman] [--run-flags "..."] [-- FLAGS OF THE SERVER]

The container is started by the README's `docker run` line, with a free port and volumes of its own. Needs docker or
podman. Prints one line for each check and, as its last line, one JSON document; exits with 1 where a check fails. Knows
the server's HTTP and nothing of its inside.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
IN_FLIGHT = 12  # requests that are being answered when SIGTERM comes
DRAIN_LIMIT_S = 30
ENGINE = "/engines/tiny"
BUILD = f"python build_engine.py --model tiny --gpu cpu --precision fp32 --batches 1,2 --out {ENGINE}".split()
BODY = {"prompt": "a red circle on a white background", "seed": 7}
PARTS = """
import pathlib
def size(path): return sum(one.lstat().st_size for one in (path.rglob('*') if path.is_dir() else [path]))
packages = next(pathlib.Path('/venv/lib').glob('python3*/site-packages'))
sizes = {one.name: size(one) for one in packages.iterdir()}
largest = sorted(sizes, key=sizes.get)[:-7:-1]
print(*(f'{name} {sizes.pop(name) >> 20},' for name in largest), f'{len(sizes)} more {sum(sizes.values()) >> 20},')
print(f"models {size(pathlib.Path('/app/models')) >> 20}")
"""
COMPILERS = ("cc", "gcc", "g++", "clang", "ld", "make", "nvcc")


class CheckError(Exception):
    """A check that the image does not pass."""


def readme_flags() -> list[str]:
    """The flags of the README's `docker run` line: everything between `run` and the image."""
    (line,) = [line for line in README.read_text().splitlines() if line.strip().startswith("docker run ")]
    return shlex.split(line)[2:-1]


def volumes_of(flags: list[str]) -> dict[str, str]:
    """Name -> folder of each --volume among the flags of `run`."""
    values = [value for flag, value in pairwise(flags) if flag == "--volume"]
    return dict(value.split(":") for value in values)


@dataclass(frozen=True)
class Containers:
    """docker or podman, with the flags that this machine needs."""

    command: list[str]
    run_flags: list[str]
    image: str
    arguments: list[str]
    mark: str  # goes before the names of volumes, so that nobody else's are touched

    def do(self, *words: str, check: bool = True) -> str:
        done = subprocess.run([*self.command, *words], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise CheckError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    @contextmanager
    def running(self, *arguments: str) -> Iterator["Running"]:
        """A container as the README starts it, with further flags of the server, on a free port; removed in the end."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = [word.replace("127.0.0.1:8000:", f"127.0.0.1:{port}:") for word in readme_flags()]
        for name in volumes_of(flags):
            flags = [word.replace(f"{name}:", f"{self.mark}-{name}:", 1) for word in flags]
        if "--network=host" in self.run_flags:
            place = flags.index("--publish")
            flags[place : place + 2] = ["--env", f"SPRINT_PORT={port}"]
        # `run` in its two halves: how long storage takes to lay out a container is not the image's doing.
        name = self.do("create", *flags, *self.run_flags, self.image, *self.arguments, *arguments)
        began = time.monotonic()
        self.do("start", name)
        try:
            yield Running(self, name, f"http://127.0.0.1:{port}", began)
        finally:
            self.do("rm", "--force", name, check=False)


@dataclass(frozen=True)
class Running:
    containers: Containers
    name: str
    address: str
    began: float

    def inside(self, *words: str) -> str:
        return self.containers.do("exec", self.name, *words)

    def get(self, path: str) -> tuple[int, bytes]:
        return answer(urllib.request.Request(self.address + path))

    def generate(self, **more: object) -> tuple[int, bytes]:
        data = json.dumps(BODY | more).encode()
        return answer(urllib.request.Request(self.address + "/generate", data, {"content-type": "application/json"}))

    def restarted(self) -> "Running":
        self.containers.do("stop", "--time", str(DRAIN_LIMIT_S + 10), self.name)
        began = time.monotonic()
        self.containers.do("start", self.name)
        return replace(self, began=began)

    def until_ready(self, limit_s: float = 900) -> float:
        """Seconds from the start of the container to ready."""
        while self.get("/health/ready")[0] != 200:
            if time.monotonic() - self.began > limit_s:
                raise CheckError(f"not ready in {limit_s:g} s: {self.containers.do('logs', self.name)[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - self.began

    def backend(self) -> object:
        return json.loads(self.get("/v1/info")[1])["backend"]

    def files(self, folder: str) -> str:
        """Names, sizes and times of everything under `folder`."""
        script = (
            f"import pathlib; files = [(str(one), one.stat().st_size, one.stat().st_mtime_ns) "
            f"for one in pathlib.Path({folder!r}).rglob('*') if one.is_file()]; print(sorted(files))"
        )
        return self.inside("python", "-c", script)

    def jobs_inside(self) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        wanted = ("sana_sprint_jobs_waiting ", "sana_sprint_jobs_running ")
        return sum(float(line.split()[1]) for line in lines if line.startswith(wanted))


def answer(request: urllib.request.Request) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def expect(seen: object, wanted: object, what: str) -> None:
    if seen != wanted:
        raise CheckError(f"{what}: got {seen!r}, wanted {wanted!r}")


def made_of(box: Running) -> str:
    return "MiB: " + " ".join(box.inside("python", "-c", PARTS).split()) + "; the rest is the base image"


def nobody(box: Running) -> str:
    expect(box.inside("python", "-c", "import os; print(os.getuid(), os.getgid())"), "10001 10001", "uid and gid")
    return "uid 10001, gid 10001"


def read_only_root(box: Running) -> str:
    attempt = "import pathlib\ntry: pathlib.Path('/app/x').write_text('')\nexcept OSError as error: print(error.errno)"
    if box.inside("python", "-c", attempt) not in ("30", "13"):  # EROFS, EACCES
        raise CheckError("the root can be written")
    return "cannot be written"


def no_compiler(box: Running) -> str:
    look = f"import shutil; print(*filter(shutil.which, {COMPILERS!r}))"
    expect(box.inside("python", "-c", look), "", "compilers in the image")
    return "none of " + ", ".join(COMPILERS)


def a_picture(box: Running) -> str:
    status, content = box.generate()
    expect((status, content[:8]), (200, b"\x89PNG\r\n\x1a\n"), "POST /generate")
    return f"PNG of {len(content)} bytes"


def health_check(box: Running) -> str:
    box.inside("python", "deploy/healthcheck.py")
    return "passes"


def drains(box: Running) -> str:
    """SIGTERM while requests are inside: all of them are answered, and the process ends by itself."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        asked = [pool.submit(box.generate, seed=seed, num_inference_steps=4) for seed in range(IN_FLIGHT)]
        while box.jobs_inside() + sum(one.done() for one in asked) < IN_FLIGHT:
            time.sleep(0.01)
        inside = sum(not one.done() for one in asked)
        began = time.monotonic()
        box.containers.do("stop", "--time", str(DRAIN_LIMIT_S + 10), box.name)
        seconds = time.monotonic() - began
        expect({one.result()[0] for one in asked}, {200}, "answers to requests inside when SIGTERM came")
    if not inside:
        raise CheckError("nothing was inside when SIGTERM came; the check proves nothing")
    expect(box.containers.do("inspect", "--format", "{{.State.ExitCode}}", box.name), "0", "exit code after SIGTERM")
    if seconds > DRAIN_LIMIT_S:
        raise CheckError(f"stopped after {seconds:.1f} s, allowed {DRAIN_LIMIT_S}")
    return f"{inside} requests inside, all answered, exit 0 after {seconds:.1f} s"


FIRST: dict[str, Callable[[Running], str]] = {
    "made of": made_of,
    "user": nobody,
    "root": read_only_root,
    "compilers": no_compiler,
    "picture": a_picture,
    "health check": health_check,
    "SIGTERM": drains,
}


def keeps_volumes(containers: Containers) -> str:
    """Checks that the next container reads what one container wrote to its volumes."""
    script = "import pathlib; path = pathlib.Path('{0}/kept'); {1}"
    folders = volumes_of(readme_flags()).values()
    with containers.running() as box:
        first = box.until_ready()
        for folder in folders:
            box.inside("python", "-c", script.format(folder, "path.write_text('kept')"))
    with containers.running() as box:
        second = box.until_ready()
        found = [box.inside("python", "-c", script.format(folder, "print(path.read_text())")) for folder in folders]
    expect(found, ["kept"] * len(found), "files on the volumes")
    return f"kept; ready after {first:.1f} s, again after {second:.1f} s"


def keeps_engines(containers: Containers) -> str:
    """An engine that one container builds onto its volume is served by the next, and after a restart, as it is."""
    with containers.running() as box:
        box.until_ready()
        if (
            box.inside("python", "-c", "from importlib.util import find_spec; print(bool(find_spec('openvino')))")
            != "True"
        ):
            return "not checked: this image holds no OpenVINO, which builds engines without a GPU"
        began = time.monotonic()
        box.inside(*BUILD)
        built = time.monotonic() - began
    with containers.running("--engine", ENGINE) as box:
        first = box.until_ready()
        expect(box.backend(), "openvino", "backend")
        picture, files = box.generate(), box.files(ENGINE)
        expect(picture[0], 200, "POST /generate of the built engine")
        box = box.restarted()
        second = box.until_ready()
        expect(box.backend(), "openvino", "backend after a restart")
        expect(box.generate() == picture, True, "the same picture after a restart")
        expect(box.files(ENGINE), files, "files of the engine after a restart")
    return f"built in {built:.1f} s; ready after {first:.1f} s, restarted after {second:.1f} s; no file of it changed"


def check(containers: Containers) -> dict[str, str]:
    found: dict[str, str] = {}

    def note(name: str, text: str) -> None:
        found[name] = text
        print(f"{name:14} {text}", flush=True)

    size = int(containers.do("image", "inspect", "--format", "{{.Size}}", containers.image))
    note("size", f"{size / 2**20:.0f} MiB")
    with containers.running() as box:
        note("ready", f"after {box.until_ready():.1f} s")
        for name, one in FIRST.items():
            note(name, one(box))
    note("volumes", keeps_volumes(containers))
    note("engine", keeps_engines(containers))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--image", required=True)
    parser.add_argument("--container", default="docker", help="docker or podman, with its global flags")
    parser.add_argument("--run-flags", default="", help="further flags of `run`")
    parser.add_argument("arguments", nargs="*", help="flags of the server, after --")
    given = parser.parse_args()
    mark = f"check-{int(time.time())}"
    containers = Containers(
        shlex.split(given.container), shlex.split(given.run_flags), given.image, given.arguments, mark
    )
    try:
        found = check(containers)
    except CheckError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        containers.do("volume", "rm", *(f"{mark}-{name}" for name in volumes_of(readme_flags())), check=False)
    print(json.dumps({"image": given.image, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
