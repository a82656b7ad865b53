"""Native engines for tests: build specs, loading with the kernels' references, images, and partial compilation."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engines.artifacts.manifest import read_manifest
from engines.artifacts.native import compiling
from engines.artifacts.native.compiling import CompileRequest
from engines.backends.cuda.graphs import EagerReplay
from engines.build.spec import BuildSpec
from engines.checkpoints.checkpoint import open_checkpoint
from engines.kernels.launch_code import stub_libcuda
from engines.kernels.op import Ops
from engines.loader import load_engine
from engines.pipeline.native import NativeBackend
from engines.types import Engine, Job, RawImage

ROOT = Path(__file__).resolve().parents[2]
_PART = 10  # every 10th kernel suffices for most tests

_compile_kernels = compiling.compile_kernels


def spec(model: Path, out: Path, gpu: str = "h100", precision: str = "bf16") -> BuildSpec:
    return BuildSpec(str(model), gpu, precision, out, batches=(1,), steps=(1, 2), vendor="native", jobs=2)


def loaded(model: Path, engine: Path | None = None, **more: Any) -> Engine:
    """Loads `engine`, or without it the checkpoint itself, with the kernels' references."""
    native = NativeBackend(Ops(None), open_checkpoint(str(model)).autoencoder)
    options = {"precision": "bf16", "backend": "cuda-graph", "max_batch": 1} if engine is None else {}
    folder = None if engine is None else str(engine)
    options = {**options, "device": "cpu", "recorder": EagerReplay(), **more}
    return load_engine(str(model), engine_dir=folder, native=native, **options)


def drawn(engine: Engine) -> list[RawImage]:
    jobs = [Job(f"{word} circle", seed=seed, width=64, height=64, steps=1 + seed) for seed, word in enumerate("ab")]
    return [engine.generate([job])[0] for job in jobs]


def compile_some(request: CompileRequest, _jobs: int) -> Mapping[str, str]:
    """Replaces compile_kernels."""
    return _compile_kernels(replace(request, of=_PART), 1)


_LAUNCHING = """
import json, sys
from pathlib import Path
from triton import knobs
from engines.artifacts.native.kernel_cache import use_compiled_kernels
from engines.artifacts.native.offline import ShareLauncher, enter_offline_mode
folder, libcuda, empty, request = sys.argv[1:5]
knobs.cache.dir = empty
seen = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: seen.append((src.name, cache_hit))
use_compiled_kernels(Path(folder))
from engines.artifacts.native.compiling import CompileRequest, launch_all
from engines.checkpoints.checkpoint import open_checkpoint
import torch
request = CompileRequest(**json.loads(request))
capability = tuple(request.capability)
launches = enter_offline_mode(Path(libcuda), capability, calls_launchers=True)
share = ShareLauncher(capability, 0, request.of)
with torch.inference_mode():
    launch_all(open_checkpoint(request.model), share, request)
print(json.dumps([launches(), len(seen), [name for name, hit in seen if not hit], len(share.failed)]))
"""


def launched(engine: Path, scratch: Path, whole: bool = False) -> tuple[int, int, list[str], int]:
    """Launches the compiled kernels of the folder `engine` in a process with an empty cache and no C compiler.

    Returns the launches, the kernels looked up, the names of those compiled again, and the failures. Triton's cache, C
    launcher and tensor maps are real; the driver is a stub.
    """
    manifest = read_manifest(engine)
    major, _, minor = str(manifest.compute_capability).partition(".")
    capability = (int(major), int(minor))
    (scratch / "stub").mkdir()
    libcuda = stub_libcuda(scratch / "stub")
    ranges = json.loads((engine / "native.json").read_text())["ranges"]
    request = CompileRequest(
        manifest.checkpoint, None, [(64, 64)], [1], ranges, capability, "", of=1 if whole else _PART
    )
    arguments = [str(engine / "kernels"), str(libcuda), str(scratch / "empty"), json.dumps(asdict(request))]
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    process = subprocess.run(
        [sys.executable, "-c", _LAUNCHING, *arguments],
        cwd=ROOT,
        env={**environment, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    launches, looked_up, compiled, failed = json.loads(process.stdout.splitlines()[-1])
    return launches, looked_up, compiled, failed
