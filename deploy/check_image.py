"""Checks a container image by running it: user, read-only root, answers, drain, and an engine that it builds onto its
volume and serves after a restart.

    python deploy/check_image.py --image NAME [--container podman] [--run-flags "..."] [-- FLAGS OF THE SERVER]

It starts the container by the README's `docker run` line, with a free port and volumes of its own. Needs docker or
podman. Prints one line for each check and, as its last line, one JSON document; exits with 1 if a check fails.
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
IN_FLIGHT = 12  # requests at SIGTERM
DRAIN_LIMIT_S = 30
READY_LIMIT_S = 900
ENGINE = "/engines/tiny"
BUILD = f"python build_engine.py --model tiny --gpu cpu --precision fp32 --batches 1,2 --out {ENGINE}".split()
FOR_A_CARD = "/engines/tiny-h100"
BUILD_FOR_A_CARD = (
    f"python build_engine.py --model tiny --gpu h100 --vendor native --precision bf16 --batches 1 --out {FOR_A_CARD}"
).split()
BODY = {"prompt": "a red circle on a white background", "seed": 7}
PRINT_SIZES = """
import pathlib
def size(path): return sum(file.lstat().st_size for file in (path.rglob('*') if path.is_dir() else [path]))
packages = next(pathlib.Path('/venv/lib').glob('python3*/site-packages'))
sizes = {package.name: size(package) for package in packages.iterdir()}
largest = sorted(sizes, key=sizes.get)[:-7:-1]
print(*(f'{name} {sizes.pop(name) >> 20},' for name in largest), f'{len(sizes)} more {sum(sizes.values()) >> 20},')
print(f"models {size(pathlib.Path('/app/models')) >> 20}")
"""
COMPILERS = ("cc", "gcc", "g++", "clang", "ld", "make", "nvcc")


class CheckError(Exception):
    """The image fails a check."""


def readme_flags() -> list[str]:
    """Returns the flags of the README's `docker run` line, between `run` and the image."""
    (line,) = [line for line in README.read_text().splitlines() if line.strip().startswith("docker run ")]
    return shlex.split(line)[2:-1]


def volumes_of(flags: list[str]) -> dict[str, str]:
    """Returns the folder of each --volume flag by the volume's name."""
    values = [value for flag, value in pairwise(flags) if flag == "--volume"]
    return dict(value.split(":") for value in values)


@dataclass(frozen=True)
class Containers:
    """docker or podman, with this machine's flags."""

    command: list[str]
    run_flags: list[str]
    image: str
    arguments: list[str]
    prefix: str  # of the names of volumes, so that others' volumes are safe

    def run(self, *arguments: str, check: bool = True) -> str:
        process = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if check and process.returncode:
            raise CheckError(f"{' '.join(arguments)}: exit {process.returncode}: {process.stderr.strip()}")
        return process.stdout.strip()

    @contextmanager
    def running(self, *arguments: str) -> Iterator["Running"]:
        """Starts the README's container with further flags of the server on a free port; removes it at the end."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = [word.replace("127.0.0.1:8000:", f"127.0.0.1:{port}:") for word in readme_flags()]
        for name in volumes_of(flags):
            flags = [word.replace(f"{name}:", f"{self.prefix}-{name}:", 1) for word in flags]
        if "--network=host" in self.run_flags:
            at = flags.index("--publish")
            flags[at : at + 2] = ["--env", f"SPRINT_PORT={port}"]
        # `create` and `start` instead of `run`, so that the start time excludes the storage's layout of a container.
        name = self.run("create", *flags, *self.run_flags, self.image, *self.arguments, *arguments)
        began = time.monotonic()
        self.run("start", name)
        try:
            yield Running(self, name, f"http://127.0.0.1:{port}", began)
        finally:
            self.run("rm", "--force", name, check=False)


@dataclass(frozen=True)
class Running:
    containers: Containers
    name: str
    address: str
    began: float

    def execute(self, *command: str) -> str:
        return self.containers.run("exec", self.name, *command)

    def get(self, path: str) -> tuple[int, bytes]:
        return send(urllib.request.Request(self.address + path))

    def generate(self, **more: object) -> tuple[int, bytes]:
        data = json.dumps(BODY | more).encode()
        return send(urllib.request.Request(self.address + "/generate", data, {"content-type": "application/json"}))

    def restarted(self) -> "Running":
        self.containers.run("stop", "--time", str(DRAIN_LIMIT_S + 10), self.name)
        began = time.monotonic()
        self.containers.run("start", self.name)
        return replace(self, began=began)

    def until_ready(self) -> float:
        """Waits, and returns the seconds from the start of the container to ready."""
        while self.get("/health/ready")[0] != 200:
            if time.monotonic() - self.began > READY_LIMIT_S:
                raise CheckError(f"not ready in {READY_LIMIT_S} s: {self.containers.run('logs', self.name)[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - self.began

    def backend(self) -> object:
        return json.loads(self.get("/v1/info")[1])["backend"]

    def files(self, folder: str) -> str:
        """Lists names, sizes and times of all files in a folder."""
        script = (
            f"import pathlib; paths = [path for path in pathlib.Path({folder!r}).rglob('*') if path.is_file()]; "
            "print(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths))"
        )
        return self.execute("python", "-c", script)

    def jobs_in_flight(self) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        gauges = ("sana_sprint_jobs_waiting ", "sana_sprint_jobs_running ")
        return sum(float(line.split()[1]) for line in lines if line.startswith(gauges))


def send(request: urllib.request.Request) -> tuple[int, bytes]:
    """Returns status and body; status 0 without an answer."""
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def expect(got: object, expected: object, what: str) -> None:
    if got != expected:
        raise CheckError(f"{what}: got {got!r}, expected {expected!r}")


def packages(container: Running) -> str:
    return "MiB: " + " ".join(container.execute("python", "-c", PRINT_SIZES).split()) + "; the rest is the base image"


def user(container: Running) -> str:
    expect(
        container.execute("python", "-c", "import os; print(os.getuid(), os.getgid())"), "10001 10001", "uid and gid"
    )
    return "uid 10001, gid 10001"


def read_only_root(container: Running) -> str:
    attempt = "import pathlib\ntry: pathlib.Path('/app/x').write_text('')\nexcept OSError as error: print(error.errno)"
    if container.execute("python", "-c", attempt) not in ("30", "13"):  # EROFS, EACCES
        raise CheckError("the root can be written")
    return "cannot be written"


def no_compiler(container: Running) -> str:
    look = f"import shutil; print(*filter(shutil.which, {COMPILERS!r}))"
    expect(container.execute("python", "-c", look), "", "compilers in the image")
    return "none of " + ", ".join(COMPILERS)


def has_cpu_kernels(container: Running) -> str:
    look = (
        "from pathlib import Path; from engines.backends.cpu.kernels.checked import load_library; "
        "print(load_library(Path('/nowhere')) is not None)"
    )
    expect(container.execute("python", "-c", look), "True", "kernels for this CPU, compiled in the image")
    return "load, and compute right"


def generates(container: Running) -> str:
    status, content = container.generate()
    expect((status, content[:8]), (200, b"\x89PNG\r\n\x1a\n"), "POST /generate")
    return f"PNG of {len(content)} bytes"


def health_check(container: Running) -> str:
    container.execute("python", "deploy/healthcheck.py")
    return "passes"


def drains(container: Running) -> str:
    """Sends SIGTERM during requests: the server answers all of them, and exits."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        requests = [pool.submit(container.generate, seed=seed, num_inference_steps=4) for seed in range(IN_FLIGHT)]
        while container.jobs_in_flight() + sum(request.done() for request in requests) < IN_FLIGHT:
            time.sleep(0.01)
        in_flight = sum(not request.done() for request in requests)
        began = time.monotonic()
        container.containers.run("stop", "--time", str(DRAIN_LIMIT_S + 10), container.name)
        seconds = time.monotonic() - began
        expect({request.result()[0] for request in requests}, {200}, "answers to requests in flight at SIGTERM")
    if not in_flight:
        raise CheckError("no request was in flight at SIGTERM, so the check is void")
    expect(
        container.containers.run("inspect", "--format", "{{.State.ExitCode}}", container.name),
        "0",
        "exit code after SIGTERM",
    )
    if seconds > DRAIN_LIMIT_S:
        raise CheckError(f"stopped after {seconds:.1f} s, allowed {DRAIN_LIMIT_S}")
    return f"{in_flight} requests in flight, all answered, exit 0 after {seconds:.1f} s"


CHECKS: dict[str, Callable[[Running], str]] = {
    "packages": packages,
    "user": user,
    "root": read_only_root,
    "compilers": no_compiler,
    "kernels for a CPU": has_cpu_kernels,
    "generate": generates,
    "health check": health_check,
    "SIGTERM": drains,
}


def keeps_volumes(containers: Containers) -> str:
    """Checks that a second container reads the files of the first from its volumes."""
    script = "import pathlib; path = pathlib.Path('{0}/kept'); {1}"
    folders = volumes_of(readme_flags()).values()
    with containers.running() as container:
        first = container.until_ready()
        for folder in folders:
            container.execute("python", "-c", script.format(folder, "path.write_text('kept')"))
    with containers.running() as container:
        second = container.until_ready()
        contents = [
            container.execute("python", "-c", script.format(folder, "print(path.read_text())")) for folder in folders
        ]
    expect(contents, ["kept"] * len(contents), "files on the volumes")
    return f"kept; ready after {first:.1f} s, again after {second:.1f} s"


def seconds_of_build(containers: Containers, package: str, command: list[str]) -> float | None:
    """Runs the command in a container of its own; returns its seconds, or None if the image lacks the package."""
    look = f"from importlib.util import find_spec; print(bool(find_spec('{package}')))"
    with containers.running() as container:
        container.until_ready()
        if container.execute("python", "-c", look) != "True":
            return None
        began = time.monotonic()
        container.execute(*command)
        return time.monotonic() - began


def keeps_engines(containers: Containers) -> str:
    """Checks that a second container serves the engine of the first, unchanged also after a restart."""
    built = seconds_of_build(containers, "openvino", BUILD)
    if built is None:
        return "not checked: this image holds no OpenVINO, whose engines a CPU serves"
    with containers.running("--engine", ENGINE) as container:
        first = container.until_ready()
        expect(container.backend(), "openvino", "backend")
        reply, files = container.generate(), container.files(ENGINE)
        expect(reply[0], 200, "POST /generate of the built engine")
        container = container.restarted()
        second = container.until_ready()
        expect(container.backend(), "openvino", "backend after a restart")
        expect(container.generate() == reply, True, "the same image after a restart")
        expect(container.files(ENGINE), files, "files of the engine after a restart")
    return f"built in {built:.1f} s; ready after {first:.1f} s, restarted after {second:.1f} s; no file of it changed"


def builds_for_a_card(containers: Containers) -> str:
    """Checks that an image without a C compiler compiles our kernels, and that a second container finds the engine."""
    built = seconds_of_build(containers, "triton", BUILD_FOR_A_CARD)
    if built is None:
        return "not checked: this image holds no Triton, which compiles kernels"
    with containers.running() as container:
        container.until_ready()
        listed = container.execute(*["python", "build_engine.py", "--list", "/engines"])
    if not listed.startswith(f"{FOR_A_CARD}: tiny native bf16"):
        raise CheckError(f"the engine of the first container: got {listed!r}")
    return f"built in {built:.1f} s, found by the next container: {listed.removeprefix(f'{FOR_A_CARD}: ')}"


def check(containers: Containers) -> dict[str, str]:
    results: dict[str, str] = {}

    def note(name: str, text: str) -> None:
        results[name] = text
        print(f"{name:14} {text}", flush=True)

    size = int(containers.run("image", "inspect", "--format", "{{.Size}}", containers.image))
    note("size", f"{size / 2**20:.0f} MiB")
    with containers.running() as container:
        note("ready", f"after {container.until_ready():.1f} s")
        for name, run_check in CHECKS.items():
            note(name, run_check(container))
    note("volumes", keeps_volumes(containers))
    note("engine", keeps_engines(containers))
    note("for a card", builds_for_a_card(containers))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--image", required=True)
    parser.add_argument("--container", default="docker", help="docker or podman, with its global flags")
    parser.add_argument("--run-flags", default="", help="further flags of `run`")
    parser.add_argument("arguments", nargs="*", help="flags of the server, after --")
    options = parser.parse_args()
    prefix = f"check-{int(time.time())}"
    containers = Containers(
        shlex.split(options.container), shlex.split(options.run_flags), options.image, options.arguments, prefix
    )
    try:
        results = check(containers)
    except CheckError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        containers.run("volume", "rm", *(f"{prefix}-{name}" for name in volumes_of(readme_flags())), check=False)
    print(json.dumps({"image": options.image, **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
