"""Operations and bytes of a computation, counted from the calls that its modules make.

The computation runs on the meta device: every call is seen with its shapes and types, nothing is calculated and no
memory is needed. Formulas for operations are torch's own (torch.utils.flop_counter), two for a multiply-add.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Kind = Literal["product", "depthwise", "other"]  # matrix products and convolutions; those channel by channel; the rest

# Return new memory or none, without reading or writing any: no cost on a device.
_FREE = {"aten._unsafe_view.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.lift_fresh.default"}
_ONE_KERNEL = torch.ops.aten.rms_norm.default  # composite, but a single kernel on a GPU
_ROWS = {"aten.embedding", "aten.index_select"}  # read as many bytes of a table as they write
_OVER = {"aten.copy_", "aten.fill_", "aten.zero_"}  # do not read their target


@dataclass(frozen=True, slots=True)
class Call:
    """One operation, taken as one kernel."""

    name: str
    kind: Kind
    dtype: torch.dtype  # of its first tensor
    operations: int
    read: int  # bytes
    written: int


class CallRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees every call within `with`. `execute` runs a call; `note` receives those that cost something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        keywords = options or {}
        # In inference mode composite calls arrive undecomposed.
        if function._overloadpacket not in flop_registry and function is not _ONE_KERNEL:
            with self:
                parts = function.decompose(*arguments, **keywords)
            if parts is not NotImplemented:
                return parts
        output = self.execute(function, arguments, keywords)
        views = any(item.alias_info is not None and not item.alias_info.is_write for item in function._schema.returns)
        if not views and str(function) not in _FREE:
            self.note(function, arguments, keywords, output)
        return output

    def execute(self, function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        return function(*arguments, **options)

    def note(self, function: Any, arguments: Sequence[Any], options: dict[str, Any], output: Any) -> None:
        self.calls.append(call_of(function, arguments, options, output))


def call_of(function: Any, arguments: Sequence[Any], options: dict[str, Any], output: Any) -> Call:
    inputs, outputs = list(tensors_in((arguments, options))), list(tensors_in(output))
    formula = flop_registry.get(function._overloadpacket)
    operations = int(formula(*arguments, **options, out_val=output)) if formula else 0
    kind: Kind = "product" if formula else "other"
    if function._overloadpacket is torch.ops.aten.convolution and arguments[8] == arguments[0].shape[1]:
        kind = "depthwise"
    written = sum(map(_bytes, outputs))
    name = str(function._overloadpacket)
    return Call(
        name=name,
        kind=kind,
        dtype=(inputs or outputs)[0].dtype,
        operations=operations,
        read=written if name in _ROWS else sum(map(_bytes, inputs)) - (written if name in _OVER else 0),
        written=written,
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _bytes(tensor: Tensor) -> int:
    """Returns the bytes in memory; an expanded tensor counts once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def count(computation: Callable[[], object]) -> list[Call]:
    """Returns the calls of `computation`, in order. Its tensors must be on the meta device."""
    recorder = CallRecorder()
    with torch.no_grad(), recorder:
        computation()
    return recorder.calls
