"""Compiles the kernels of an engine in worker processes: `python -m engines.artifacts.native.compiling JSON`.

Each worker makes the engine's skeleton, launches on it all that the server captures, and compiles its share. They are
processes because Triton's target is one per process, and because a compilation keeps a core busy.
"""

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engines.artifacts.native.offline import ShareLauncher, enter_offline_mode
from engines.artifacts.native.skeleton import DTYPE, skeleton
from engines.artifacts.native.storages import META
from engines.backends.cuda.decoder import CudaDecoder
from engines.backends.cuda.encoder import CudaEncoder
from engines.backends.cuda.graphs import GraphKey
from engines.backends.cuda.text import CudaTextEncoder
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_fast_decoder
from engines.errors import BuildError, SprintError
from engines.kernels.launch_code import stub_libcuda
from engines.kernels.op import Launcher, Ops
from engines.pipeline.denoise_decode import Decode, Denoise, input_specs
from engines.pipeline.native import NativeBackend, Ranges

_ROOT = Path(__file__).resolve().parents[3]
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SHORT_NAMES = ("tiny", "full", "lite", "taesana")  # also where a folder of that name lies


@dataclass(frozen=True)
class CompileRequest:
    """A set of kernels to compile: sizes (width, height) in pixels, the GPU, and every `of`-th of all kernels."""

    model: str
    decoder: str | None
    sizes: Sequence[Sequence[int]]
    batches: Sequence[int]
    ranges: Ranges
    capability: Sequence[int]
    cache: str
    fast_decoder: str | None = None
    libcuda: str = ""
    index: int = 0
    of: int = 1


def launch_all(checkpoint: Checkpoint, launcher: Launcher, request: CompileRequest) -> None:
    """Launches the kernels of a server: text, denoising, encoding and decoding of every bucket and size."""
    fast = None if request.fast_decoder is None else open_fast_decoder(checkpoint, request.fast_decoder)
    parts = skeleton(checkpoint, NativeBackend(Ops(launcher), checkpoint.autoencoder), request.ranges, fast)
    unit, config = checkpoint.autoencoder.compression, checkpoint.transformer
    tokens = checkpoint.settings.max_prompt_tokens
    specs = input_specs(config.in_channels, tokens, config.caption_channels, DTYPE, drawing=False)
    if isinstance(parts.text.encoder, CudaTextEncoder):
        parts.text.encoder.warm()
    denoise = Denoise(parts.transformer, DTYPE)
    decoders = [decoder for decoder in (parts.decoder, parts.fast_decoder) if isinstance(decoder, CudaDecoder)]
    for width, height in request.sizes:
        for batch in request.batches:
            key = GraphKey(batch, height // unit, width // unit, 1)
            denoise({name: torch.empty(spec.shape(key), dtype=spec.dtype, device=META) for name, spec in specs.items()})
            if isinstance(parts.encoder, CudaEncoder):
                parts.encoder(torch.empty(batch, height, width, 3, dtype=torch.uint8, device=META))
        for decoder in decoders:
            latent = torch.empty(1, config.in_channels, height // unit, width // unit, device=META)
            Decode(decoder)({"latent": latent})


def compile_kernels(request: CompileRequest, jobs: int) -> Mapping[str, str]:
    """Fills request.cache with `jobs` processes. Returns kernel -> reason for those that do not fit the GPU.

    Raises BuildError.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = replace(
            request,
            model=_absolute(request.model),
            decoder=request.decoder and _absolute(request.decoder),
            fast_decoder=request.fast_decoder and _absolute(request.fast_decoder),
            libcuda=str(stub_libcuda(Path(folder))),
        )
        shares = [replace(request, index=request.index + request.of * job, of=request.of * jobs) for job in range(jobs)]
        # Triton's interpreter, which tests use, compiles nothing.
        start = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-m", "engines.artifacts.native.compiling"]
        running = [
            subprocess.Popen(
                [*start, json.dumps(asdict(share))],
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for share in shares
        ]
        try:
            outputs = [process.communicate() for process in running]
        finally:
            for process in running:
                process.kill()
    failed: dict[str, str] = {}
    for process, (out, err) in zip(running, outputs, strict=True):
        if process.returncode:
            last = (err.strip().splitlines() or [f"ended with code {process.returncode}"])[-1]
            raise BuildError(f"build: kernels were not compiled: {last.removeprefix('build: ')}")
        failed |= json.loads(out.splitlines()[-1])
    return failed


def _absolute(name: str) -> str:
    """Returns the name of a checkpoint or decoder for a process with another working directory."""
    return str(Path(name).absolute()) if name not in _SHORT_NAMES and Path(name).exists() else name


@torch.inference_mode()
def main(line: str) -> int:
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # ends with the build
    request = CompileRequest(**json.loads(line))
    capability = (request.capability[0], request.capability[1])
    try:
        enter_offline_mode(Path(request.libcuda), capability, Path(request.cache))
        share = ShareLauncher(capability, request.index, request.of)
        launch_all(open_checkpoint(request.model, request.decoder), share, request)
    except SprintError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(share.failed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
