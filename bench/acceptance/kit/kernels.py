"""Compiles a server's kernels on all cores into Triton's folder; a server would compile them one by one.

    python -m bench.acceptance.kit.kernels --model random:sprint-0.6b --cache DIR

Uses the compilation of native engines (engines.artifacts.native.compiling); a server's kernels have the same keys.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.cli import run_benchmark
from bench.harness.errors import BenchError
from engines.artifacts.native.compiling import CompileRequest, compile_kernels
from engines.artifacts.native.offline import CARDS
from engines.artifacts.native.skeleton import skeleton
from engines.checkpoints.checkpoint import open_checkpoint
from engines.device.hardware import capability_text, this_machine
from engines.kernels.op import Ops
from engines.pipeline.native import NativeBackend


def compile_all(model: str, cache: Path, capability: tuple[int, int], jobs: int, of: int = 1) -> dict[str, Any]:
    """Compiles kernels in bf16 and in fp8. of: every `of`-th kernel alone.

    Returns seconds by precision. Raises BenchError for an unknown card, BuildError where a kernel does not compile.
    """
    if capability not in CARDS:
        raise BenchError(
            f"kernels: none are compiled ahead for {capability_text(capability)}; the server compiles its own"
        )
    checkpoint = open_checkpoint(model)
    blank = NativeBackend(Ops(None), checkpoint.autoencoder)
    skeleton(checkpoint, blank, {})
    ranges = blank.ranges  # zeros: no kernel depends on the values
    sizes, seconds = (checkpoint.settings.default_size,), {}
    no_room: dict[str, str] = {}
    for precision, seen in {"bf16": {}, "fp8": ranges}.items():
        began = time.perf_counter()
        request = CompileRequest(model, None, sizes, (1, 2, 4, 8), seen, capability, str(cache.absolute()), of=of)
        no_room |= compile_kernels(request, jobs)
        seconds[precision] = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "no_room": no_room, "capability": capability_text(capability), "jobs": jobs}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance.kit.kernels", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id or random:<name>")
    parser.add_argument("--cache", type=Path, required=True, help="folder that TRITON_CACHE_DIR names later")
    parser.add_argument("--capability", help="such as 9.0; default the card's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--of", type=int, default=1, help="every N-th kernel alone, for a rehearsal")
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        capability = this_machine().capability
        if options.capability:
            major, minor = options.capability.split(".")
            capability = int(major), int(minor)
        if capability is None:
            raise BenchError("kernels: torch sees no GPU; --capability 9.0 compiles for one that is not there")
        with torch.inference_mode():
            return compile_all(options.model, options.cache, capability, options.jobs, options.of)

    return run_benchmark(measured, lambda found: f"compiled, by {found['jobs']} processes: {found['seconds']} s")


if __name__ == "__main__":
    sys.exit(main())
