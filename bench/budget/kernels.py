"""Counts arithmetic and traffic of a launch of our Triton kernels from its arguments.

It counts each input as read once, each output as written once.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.roofline.op_counter import Call, Kind

Arguments = Mapping[str, Any]

# A prefetch for the next kernel, which counts the read; tables of which a kernel reads a few rows.
_NOT_READ = {"ahead", "cosine", "sine"}


def _size(given: Arguments, name: str) -> tuple[int, ...]:
    return tuple(_tensor(given[name]).shape)


def _tensor(value: Any) -> Tensor:
    """Returns the tensor, or the one that a tensor descriptor describes."""
    found: Tensor = getattr(value, "base", value)
    return found


def _convolution(given: Arguments) -> int:
    each = int(2 * given["P"] * given["N"])
    return each * 9 * int(given["C"]) + (each * 32 if given["KIND"] == 3 else 0)


def _upsampling(given: Arguments) -> int:
    return 2 * int(given["images"] * given["H"] * given["W"]) * int(_tensor(given["w"]).numel())


def _silu_product(given: Arguments) -> int:
    return int(2 * given["M"] * given["N"] * given["K"])


def _depthwise(given: Arguments) -> int:
    return int(2 * _size(given, "taps")[0] * _tensor(given["x"]).numel())


def _context(given: Arguments) -> int:
    return _attention_part(given, mixed=2)  # k and v


def _apply(given: Arguments) -> int:
    return _attention_part(given, mixed=1)  # q


def _attention_part(given: Arguments, mixed: int) -> int:
    """Returns the operations of one d x d product per token and head, and of `mixed` more in mixed heads."""
    batch, heads = _size(given, "ctx")[:2]
    products = heads + (mixed * (heads - given["SPLIT"]) if given["MIXED"] else 0)
    return int(2 * batch * products * given["N"] * given["HD"] ** 2)


def _skinny(given: Arguments) -> int:
    return int(2 * given["M"] * given["N"] * given["K"]) * (2 if given["GATED"] else 1)


def _capped(given: Arguments) -> int:
    rows = given["B"] * given["H"] * given["L"]
    return int(4 * rows * (given["P"] + given["L"]) * given["DIM"])


def _cross(given: Arguments) -> int:
    return int(4 * _tensor(given["query"]).numel() * given["T"])


# Kernel -> which of a card's units it multiplies on, and how many operations that is. Others move data.
_ARITHMETIC: Mapping[str, tuple[Kind, Callable[[Arguments], int]]] = {
    "_convolution": ("product", _convolution),
    "_upsampling": ("product", _upsampling),
    "_silu_product": ("product", _silu_product),
    "_skinny_product": ("product", _skinny),
    "_context": ("product", _context),
    "_apply": ("product", _apply),
    "_capped_attention": ("product", _capped),
    "_cross_attention": ("product", _cross),
    "_depthwise": ("depthwise", _depthwise),
    "_gated_depthwise": ("depthwise", _depthwise),
}

# Kernel -> the share of an argument that it reads.
_SHARES: Mapping[str, Callable[[Arguments], Mapping[str, float]]] = {
    "_context": lambda _: {"first": 2 / 3, "second": 2 / 3},  # k and v
    "_apply": lambda _: {"first": 1 / 3, "second": 1 / 3},  # q
    "_row_rms": lambda given: {"x": given["D"] / given["ROW"]},
    "_cross_attention": lambda given: {"kv": 2 * given["D"] / given["KV_ROW"]},  # one block's
}


def _all(given: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor once: unused parameters get another argument again."""
    seen = set()
    for name, value in given.items():
        tensor = _tensor(value)
        if not isinstance(tensor, Tensor) or name in _NOT_READ:
            continue
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())
        if key not in seen:
            seen.add(key)
            yield name, tensor


def call_of(kernel: Any, grid: tuple[int, ...], given: Arguments) -> Call:
    """Returns one launch of `kernel` as a call; `given`: its arguments by name."""
    name: str = kernel.__name__
    tensors = dict(_all(given))
    shares = _SHARES[name](given) if name in _SHARES else {}
    if name == "zero_border":
        shares = {key: grid[0] * grid[1] * given["D"] / tensor.numel() for key, tensor in tensors.items()}
    kind, operations = _ARITHMETIC.get(name, ("other", lambda _: 0))
    first = next(iter(tensors.values()))
    total = sum(round(tensor.nbytes * shares.get(key, 1)) for key, tensor in tensors.items())
    dtype = torch.bfloat16 if kind == "product" and first.dtype.itemsize == 2 else first.dtype
    return Call(name, kind, dtype, operations(given), total, 0)
