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

# Answer with new memory or with none, without reading or writing any: no cost on a device.
_FREE = {"aten._unsafe_view.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.lift_fresh.default"}


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel, if each call were one."""

    name: str
    kind: Kind
    dtype: torch.dtype  # of its first tensor
    operations: int
    read: int  # bytes
    written: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        given = options or {}
        if function._overloadpacket not in flop_registry:  # in inference mode composite calls come whole
            with self:
                parts = function.decompose(*arguments, **given)
            if parts is not NotImplemented:
                return parts
        answer = function(*arguments, **given)
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
        if not views and str(function) not in _FREE:
            self.calls.append(_call(function, arguments, given, answer))
        return answer


def _call(function: Any, arguments: Sequence[Any], options: dict[str, Any], answer: Any) -> Call:
    inputs, outputs = list(_tensors((arguments, options))), list(_tensors(answer))
    formula = flop_registry.get(function._overloadpacket)
    operations = int(formula(*arguments, **options, out_val=answer)) if formula else 0
    kind: Kind = "product" if formula else "other"
    if function._overloadpacket is torch.ops.aten.convolution and arguments[8] == arguments[0].shape[1]:
        kind = "depthwise"
    return Call(
        name=str(function._overloadpacket),
        kind=kind,
        dtype=(inputs or outputs)[0].dtype,
        operations=operations,
        read=sum(map(_bytes, inputs)),
        written=sum(map(_bytes, outputs)),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _bytes(tensor: Tensor) -> int:
    """What lies in memory: an expanded tensor repeats what it has."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def count(computation: Callable[[], object]) -> list[Call]:
    """The calls of `computation`, in order. Its tensors must be on the meta device."""
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        computation()
    return recorder.calls
