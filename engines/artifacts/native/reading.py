"""Reads weights from disk to the device and hashes them in the same pass, several files in parallel.

On a GPU each thread alternates between two pinned buffers: one uploads while the other fills.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_THREADS = 8
_CHUNK = 2**25
_TYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


class _Reader(Protocol):
    """Reads from an open file into one tensor."""

    def __call__(self, file: Any, into: Tensor, digest: Any) -> None: ...


def read_weights(files: Sequence[tuple[Path, str]], device: torch.device) -> dict[str, Tensor]:
    """Returns the flat tensors of safetensors files, given as (path, sha256). Raises ValueError for a changed file."""
    weights: dict[str, Tensor] = {}
    # One stream for all files: PyTorch has 32 (c10/cuda/CUDAStream.h), and then hands out those of a serving engine.
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # untyped in torch's stubs
    with ThreadPoolExecutor(_THREADS) as pool:
        for tensors in pool.map(lambda file: _read(file[0], file[1], device, stream), files):
            weights |= tensors
    return weights


def _read(path: Path, sha256: str, device: torch.device, stream: Any) -> dict[str, Tensor]:
    digest, weights = hashlib.sha256(), {}
    read_into: _Reader = _read_to_host if stream is None else _PinnedReader(stream)
    try:
        with path.open("rb", buffering=0) as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            digest.update(length + header)
            entries = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            for name, value in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                weights[name] = torch.empty(value["shape"], dtype=_TYPES[value["dtype"]], device=device)
                read_into(file, weights[name], digest)
    except (ValueError, KeyError, TypeError, OverflowError, EOFError):
        digest.update(b"unreadable")
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} was changed since it was built")
    return weights


def _read_to_host(file: Any, into: Tensor, digest: Any) -> None:
    memory = _bytes_of(into)
    for start in range(0, len(memory), _CHUNK):
        _fill(file, memory[start : start + _CHUNK])
        digest.update(memory[start : start + _CHUNK])


class _PinnedReader:
    """Reads to a GPU through two pinned buffers; for one thread. stream: may be that of other readers too."""

    def __init__(self, stream: Any):
        self._buffers = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._stream = stream
        self._free = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self._turn = 0

    def __call__(self, file: Any, into: Tensor, digest: Any) -> None:
        flat = into.view(torch.uint8)
        self._stream.wait_stream(torch.cuda.current_stream(into.device))  # on which torch allocated the memory
        for start in range(0, flat.numel(), _CHUNK):
            self._turn ^= 1
            to = flat[start : start + _CHUNK]
            buffer, free = self._buffers[self._turn][: to.numel()], self._free[self._turn]
            free.synchronize()
            memory = _bytes_of(buffer)
            _fill(file, memory)
            with torch.cuda.stream(self._stream):
                to.copy_(buffer, non_blocking=True)
                free.record(self._stream)
            digest.update(memory)
        self._stream.synchronize()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a flat tensor on the host."""
    memory: Any = tensor.view(torch.uint8).numpy()
    return memoryview(memory)


def _fill(file: Any, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        got = file.readinto(memory[done:])
        if not got:
            raise EOFError
        done += got
