"""A simulated card: runs code for a GPU unchanged, computes nothing and counts its work.

Its tensors are meta tensors that report device cuda. The host's computations run; values copied from the card are ones.
It counts kernels at their launch (`Card.launcher`), other calls where PyTorch dispatches them, and graphs at their
replay (`Card.recorder`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.budget.events import Event, Launch, Mark, Replay, Transfer, Wait
from bench.budget.kernels import call_of as kernel_call
from bench.budget.memory import Memory
from bench.harness.errors import BenchError
from bench.roofline.op_counter import CallRecorder, call_of, tensors_in
from engines.kernels.op import Launcher

_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
_ITEM = torch.ops.aten._local_scalar_dense.default
_COPY, _TO_COPY = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
_SCALAR = torch.ops.aten.scalar_tensor.default
# Each has PyTorch copy Python's numbers to the card; on a meta tensor none of it is dispatched.
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_AT = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)
# baddbmm first copies the summand to the output, padding first fills the output.
_LAUNCHES = {"aten.baddbmm": 2, "aten.constant_pad_nd": 2}

T = TypeVar("T")


class Card:
    """A card that torch sees within `present`. `events`: recorded since `clear`."""

    def __init__(self, name: str, processors: int, capability: tuple[int, int]):
        self.name, self.processors, self.capability = name, processors, capability
        self.memory, self.events = Memory(), list[Event]()
        self.launcher = _Launcher(capability >= (9, 0), processors, self)
        self.recorder = _GraphRecorder(self)
        self._capturing = False
        self._pinned: dict[int, torch.UntypedStorage] = {}  # kept, so that no other gets its address

    @contextmanager
    def present(self) -> Iterator[None]:
        major, minor = self.capability
        properties = SimpleNamespace(
            name=self.name, uuid="0", multi_processor_count=self.processors, major=major, minor=minor
        )
        cuda: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda _=None: self.name,
            "get_device_capability": lambda _=None: self.capability,
            "get_device_properties": lambda _=None: properties,
            "set_device": lambda _: None,
            "empty_cache": lambda: None,
            "synchronize": lambda _=None: self.saw(Wait()),
            "device": nullcontext,
            "stream": nullcontext,
            "Stream": lambda *_, **__: _Stream(self),
            "current_stream": lambda _=None: _Stream(self),
            "default_stream": lambda _=None: _Stream(self),
            "Event": lambda enable_timing=False, **_: _CudaEvent(self, enable_timing),
        }
        with ExitStack() as stack:
            stack.enter_context(patch.multiple(torch.cuda, **cuda))
            stack.enter_context(patch.object(torch, "set_num_threads", lambda _: None))  # those of the caller's process
            stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
            stack.enter_context(_Calls(self))
            stack.enter_context(_Names(self))
            yield

    def clear(self) -> None:
        """Starts a new count."""
        self.events = []
        self.memory.settle()

    def saw(self, event: Event) -> None:
        if self._capturing and not isinstance(event, Launch):
            raise BenchError(f"a graph cannot hold a {type(event).__name__.lower()}: {event}")
        self.events.append(event)

    def holds(self, tensor: Tensor) -> None:
        self.memory.holds(tensor, pooled=self._capturing)

    def pins(self, tensor: Tensor) -> Tensor:
        """Returns `tensor` and treats its memory as pinned from now on."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def captured(self, launch: Callable[[], T]) -> tuple[tuple[Launch, ...], T]:
        """Returns the launches of `launch`, kept out of `events`, and its outputs."""
        outside, self.events, self._capturing = self.events, [], True
        try:
            outputs = launch()
            return tuple(event for event in self.events if isinstance(event, Launch)), outputs
        finally:
            self.events, self._capturing = outside, False

    def fused(self, name: str, work: Callable[[], T]) -> T:
        """Runs `work` as one launch of its products and convolutions; all else stays on the chip and counts nothing."""
        outside, self.events = self.events, []
        try:
            made = work()
            calls = [event.call for event in self.events if isinstance(event, Launch) and event.call.kind != "other"]
        finally:
            self.events = outside
        for index, call in enumerate(calls):
            self.saw(Launch(replace(call, name=name), int(index == 0)))
        return made


@dataclass(frozen=True)
class _Launcher(Launcher):
    card: Card

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        self.card.saw(Launch(kernel_call(kernel, grid, given)))


class _GraphRecorder:
    """Implements engines.backends.cuda.graphs.GraphCapture."""

    def __init__(self, card: Card):
        self._card = card

    def warm(self, launch: Callable[[], object]) -> None:
        """Does nothing: no state remains from a warm-up."""

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self._card.memory.settle()
        launches, outputs = self._card.captured(launch)
        return lambda: self._card.saw(Replay(launches)), outputs


class _Stream:
    def __init__(self, card: Card):
        self._card = card

    def wait_stream(self, other: "_Stream") -> None:
        """Does nothing: one stream waits for another, the host does not."""

    def synchronize(self) -> None:
        self._card.saw(Wait())


class _CudaEvent:
    def __init__(self, card: Card, timing: bool):
        self._card, self._timing = card, timing

    def record(self, _stream: _Stream | None = None) -> None:
        if self._timing:
            self._card.saw(Mark())

    def synchronize(self) -> None:
        self._card.saw(Wait())

    def elapsed_time(self, _later: "_CudaEvent") -> float:
        return 0.0


class _Names(TorchFunctionMode):
    """Reports meta tensors as cuda, and provides pinned memory."""

    def __init__(self, card: Card):
        super().__init__()
        self._card = card

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.device:
            return function(*arguments, **(options or {}))
        given = {name: _there(value) for name, value in (options or {}).items()}
        if getattr(function, "__self__", None) is Tensor.device:
            return _CUDA if arguments[0].is_meta else function(*arguments)
        if function is Tensor.pin_memory:
            return self._card.pins(arguments[0].clone())
        pinned = given.pop("pin_memory", False)
        made = function(*map(_there, arguments), **given)
        data = arguments[-1] if arguments else None
        if function in _FROM_NUMBERS and made.is_meta and not isinstance(data, Tensor):
            self._card.saw(Transfer(made.nbytes, pinned=False))
        if function in _INDEXING and arguments[0].is_meta:
            for index in arguments[1] if isinstance(arguments[1], tuple) else arguments[1:2]:
                if isinstance(index, list):
                    self._card.saw(Transfer(8 * len(index), pinned=False))
        return self._card.pins(made) if pinned else made


def _there(value: Any) -> Any:
    """Replaces cuda by meta."""
    if isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda":
        return _META
    return value


class _Calls(CallRecorder):  # type: ignore[no-untyped-call]  # torch's own
    """Counts calls with tensors on the card, and copies between card and host."""

    def __init__(self, card: Card):
        super().__init__()
        self._card = card
        self._scalar: Tensor | None = None  # made last of a Python number

    def execute(self, function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        if function is _ITEM and arguments[0].is_meta:
            self._card.saw(Wait())
            return torch.ones((), dtype=arguments[0].dtype).item()
        if function is _COPY and arguments[0].is_meta and arguments[0].dim() == 0 and arguments[1] is self._scalar:
            # x[0] = 1: PyTorch makes the number on the host where x is on a card, but not where it is a meta tensor.
            self._card.saw(Transfer(arguments[0].nbytes, pinned=False))
        if function in _AT and arguments[0].is_meta:
            for index in arguments[1]:
                if index is not None and not index.is_meta:
                    self._card.saw(Transfer(index.nbytes, pinned=False))
        answer = self._crossed(arguments, options) if _crosses(function, arguments, options) else None
        if answer is None:
            answer = function(*arguments, **options)
        self._scalar = answer if function is _SCALAR else self._scalar
        for tensor in tensors_in(answer):
            if tensor.is_meta:
                self._card.holds(tensor)
        return answer

    def _crossed(self, arguments: Sequence[Any], options: dict[str, Any]) -> Tensor:
        """Performs copy_(to, from) or _to_copy(from, device=...)."""
        *into, source = arguments[:2]
        if into:
            made: Tensor = into[0]
        else:
            device = _META if not source.is_meta else torch.device("cpu")
            made = torch.empty_like(source, dtype=options.get("dtype") or source.dtype, device=device)
        host = made if source.is_meta else source
        pinned, later = self._card.is_pinned(host), arguments[2:3] == (True,) or options.get("non_blocking", False)
        self._card.saw(Transfer(made.nbytes, pinned))
        if pinned and not later:
            self._card.saw(Wait())
        return made.fill_(1) if source.is_meta else made

    def note(self, function: Any, arguments: Sequence[Any], options: dict[str, Any], answer: Any) -> None:
        there = any(tensor.is_meta for tensor in tensors_in((arguments, answer)))
        if there and function is not _ITEM and not _crosses(function, arguments, options):
            call = call_of(function, arguments, options, answer)
            self._card.saw(Launch(call, _kernels(call.name, arguments)))


def _crosses(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Returns whether it is a copy between card and host."""
    if function is _COPY:
        return bool(arguments[0].is_meta != arguments[1].is_meta)
    device = options.get("device")
    return function is _TO_COPY and device is not None and (device.type == "meta") != arguments[0].is_meta


def _kernels(name: str, arguments: Sequence[Any]) -> int:
    """Returns the number of launches that PyTorch makes of one call."""
    if name == "aten.convolution":
        return 1 if arguments[2] is None else 2  # cuDNN's, and the bias
    return _LAUNCHES.get(name, 1)
