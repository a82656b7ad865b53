"""Operations with a Triton kernel and a PyTorch reference, and the choice between the two.

`run` and `reference` of an Op take the same arguments, `run` a Launcher first, and return tensors of the same shapes
and types. The reference defines the result. It runs on a CPU, and on a card if the kernel fails or is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.errors import in_one_line

# A kernel may round where its reference does not (bf16 has 8 bits); a wrong kernel is below 10 dB.
SQNR_DB = 30.0
FP8_SQNR_DB = 22.0  # e4m3 has 4 bits


@dataclass(frozen=True)
class Launcher:
    """Launches kernels on one card.

    tma: the card has the tensor memory accelerator (compute capability 9.0 and newer), so kernels load tiles by tensor
    descriptors, otherwise by pointers. processors: streaming multiprocessors, the grid of a persistent kernel.
    """

    tma: bool
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "Launcher":
        card = torch.cuda.get_device_properties(device)
        return cls(card.major >= 9, card.multi_processor_count)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launches `kernel` (triton.jit) on the current stream; constants: constexprs, num_warps, num_stages."""
        kernel[grid](*args, **constants)


@dataclass(frozen=True)
class Op:
    """One operation, which returns a tensor or a tuple of tensors."""

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]


class Ops:
    """Runs operations by their kernels; by their references without a launcher or if `replaced` names the operation.

    replaced: operation -> reason.
    """

    def __init__(self, launcher: Launcher | None):
        self._launcher = launcher
        self._checked: set[tuple[object, ...]] | None = None
        self.replaced: dict[str, str] = {}

    def __call__(self, op: Op, *args: Any) -> Any:
        if self._launcher is None or op.name in self.replaced:
            return op.reference(*args)
        if self._checked is not None:
            return self._compared(op, args)
        return op.run(self._launcher, *args)

    def compare(self, work: Callable[[], object]) -> None:
        """Runs `work` and compares each operation's kernel with its reference, once per set of shapes.

        An operation that differs or fails goes to `replaced`.
        """
        self._checked = set()
        try:
            work()
        finally:
            self._checked = None

    def _compared(self, op: Op, args: tuple[Any, ...]) -> Any:
        assert self._launcher is not None
        assert self._checked is not None
        key = (op.name, *map(_shape, args))
        if key in self._checked:
            return op.run(self._launcher, *args)
        self._checked.add(key)
        try:
            return self._beside_reference(op, args)
        except torch.OutOfMemoryError:  # tells nothing about the kernel, which needs less than its reference
            return op.run(self._launcher, *args)

    def _beside_reference(self, op: Op, args: tuple[Any, ...]) -> Any:
        """Returns the kernel's result, or the reference's if they differ. Raises torch.OutOfMemoryError."""
        # The kernel gets the originals, because an operation may write into its arguments.
        reference_args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        expected = op.reference(*reference_args)
        try:
            actual = op.run(self._launcher, *args)
            gap = _first_gap(_tensors(expected), _tensors(actual))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or driver may raise anything; the reference's result is used
            gap = in_one_line(error)
        if gap is None:
            return actual
        self.replaced[op.name] = gap
        return expected


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _first_gap(expected_outputs: tuple[Tensor, ...], actual_outputs: tuple[Tensor, ...]) -> str | None:
    for index, (expected, actual) in enumerate(zip(expected_outputs, actual_outputs, strict=True)):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return (
                f"output {index}: {list(actual.shape)} of {actual.dtype}, "
                f"its reference has {list(expected.shape)} {expected.dtype}"
            )
        bound = FP8_SQNR_DB if expected.dtype.itemsize == 1 and expected.dtype.is_floating_point else SQNR_DB
        reached = sqnr_db(expected, actual)
        if not reached >= bound:
            return f"output {index}: {reached:.1f} dB to its reference, needed are {bound:g}"
    return None


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    """Returns 10 log10 of the reference's power over the error's, at most 200; NaN if `actual` is not finite."""
    signal = expected.double()
    error = (signal - actual.double()).square().sum()
    if not bool(error.isfinite()):
        return float("nan")
    ratio = signal.square().sum().clamp_min(1e-300) / error.clamp_min(1e-320)
    return min(200.0, 10 * float(torch.log10(ratio)))


def _shape(arg: Any) -> object:
    if isinstance(arg, Tensor):
        return tuple(arg.shape), arg.dtype, arg.stride()
    return float if isinstance(arg, float) else str(arg)  # no kernel is compiled for the value of a float
