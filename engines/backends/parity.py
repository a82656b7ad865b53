"""Differences between an engine and its fp32 reference, and the gates that bound them.

Differences are taken over all outputs together. SQNR is the reference's power over the error's, in dB. A bound on the
cosine would pass a transformer without its feed-forwards; one on the SQNR does not. Images are compared in uint8
levels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engines.errors import ParityError


@dataclass(frozen=True)
class Difference:
    """Difference of one module's outputs. `relative`: max_abs over the reference's largest value; PSNR: peak 255."""

    max_abs: float
    mean_abs: float
    relative: float
    sqnr_db: float
    psnr_db: float | None = None  # None unless pixels

    def to_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Gate:
    """Bounds for one precision: `relative` or `sqnr_db` for latents, `levels` or `psnr_db` for pixels."""

    relative: float | None = None
    sqnr_db: float | None = None
    levels: int | None = None
    psnr_db: float | None = None

    def check(self, name: str, measured: Difference) -> str:
        """Returns the bound that `measured` keeps, as text. Raises ParityError if it does not keep it."""
        bounds = (
            [
                ("relative error", measured.relative, self.relative, False),
                ("SQNR", measured.sqnr_db, self.sqnr_db, True),
            ]
            if measured.psnr_db is None
            else [
                ("levels of 255", measured.max_abs, self.levels, False),
                ("PSNR", measured.psnr_db, self.psnr_db, True),
            ]
        )
        for quantity, value, bound, at_least in bounds:
            if bound is None:
                continue
            passed = value >= bound if at_least else value <= bound
            requirement = f"{quantity} {'>=' if at_least else '<='} {bound:g}{' dB' if at_least else ''}"
            if not passed:  # NaN too
                raise ParityError(
                    f"{name}: too far from its reference: {quantity} is {value:.4g}, needed {requirement}"
                )
            return requirement
        raise ValueError(f"{name}: the gate bounds nothing of this kind")


# fp16 has 11 bits and bf16 has 8, 6 dB each. fp8's bound is for random weights, which have no outliers.
GATES: Mapping[str, Gate] = {
    "fp32": Gate(relative=1e-4, levels=1),
    "fp16": Gate(sqnr_db=55, psnr_db=45),
    "bf16": Gate(sqnr_db=35, psnr_db=35),
    "fp8": Gate(sqnr_db=25),
}
# Modules with products in 8 bits against themselves: the decoder's convolutions (bf16 itself reaches 49 dB), and the
# transformer's maps, as in fp8.
INT8_GATE = Gate(psnr_db=30, sqnr_db=25)
# A compiled module, built by this or an earlier process, against the module in the same type. Both round, in different
# orders, so the bounds are wide; a wrong cache entry misses them by far.
COMPILED_GATES: Mapping[torch.dtype, Gate] = {
    torch.float32: Gate(sqnr_db=40, psnr_db=40),
    torch.float16: Gate(sqnr_db=40, psnr_db=40),
    torch.bfloat16: Gate(sqnr_db=25, psnr_db=30),
}
# Transformer and decoder in sequence.
IMAGE_GATES: Mapping[str, Gate] = {
    "fp32": Gate(levels=2),
    "fp16": Gate(psnr_db=40),
    "bf16": Gate(psnr_db=35),
    "fp8": Gate(psnr_db=20),
}


def difference(reference: Tensor, actual: Tensor) -> Difference:
    """Returns the difference of two tensors of one shape, floats or uint8 pixels; infinite if `actual` is not finite.

    Raises ParityError if the shapes differ.
    """
    if reference.shape != actual.shape:
        raise ParityError(f"shape: got {list(actual.shape)}, the reference has {list(reference.shape)}")
    pixels = reference.dtype == torch.uint8
    expected, got = reference.cpu().double(), actual.cpu().double()
    if not bool(got.isfinite().all()):
        nothing = float("-inf")
        return Difference(float("inf"), float("inf"), float("inf"), nothing, nothing if pixels else None)
    error = got - expected
    largest, worst = float(expected.abs().max()), float(error.abs().max())
    power, noise = float(expected.square().mean()), float(error.square().mean())
    return Difference(
        max_abs=worst,
        mean_abs=float(error.abs().mean()),
        relative=worst / max(largest, 1e-30),
        sqnr_db=_decibels(power, noise),
        psnr_db=_decibels(255.0**2, noise) if pixels else None,
    )


def check_compiled(
    name: str,
    module: Callable[..., object],
    run: Callable[[Mapping[str, Tensor]], Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Compares `run`, compiled from `module` in `dtype`, with the module on noise shaped as `inputs` [B, ...].

    Runs the module row by row, so that it needs the memory of one job. Raises ParityError if the gate is missed.
    """
    probe = {key: _noise_like(value, seed) for seed, (key, value) in enumerate(sorted(inputs.items()))}
    rows = [
        _first(module(**{key: value[row : row + 1] for key, value in probe.items()})) for row in range(_rows(probe))
    ]
    COMPILED_GATES[dtype].check(name, difference(torch.cat(rows), run(probe)[0]))


def _first(outputs: object) -> Tensor:
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert isinstance(first, Tensor)
    return first


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[0]


def _noise_like(value: Tensor, seed: int) -> Tensor:
    """Returns a mask of ones, random pixels, times and scales in [0, 1), or N(0, 1), by the type of `value`."""
    generator = torch.Generator().manual_seed(seed)
    if value.dtype == torch.bool:
        return torch.ones_like(value)
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator).to(value.device)
    draw = torch.rand if value.ndim == 1 else torch.randn
    return draw(value.shape, generator=generator).to(value.device, value.dtype)


def _decibels(power: float, noise: float) -> float:
    """Returns 10 log10 of the ratio, at most 200, because JSON has no infinity."""
    return min(200.0, 10 * float(torch.tensor(power / max(noise, 1e-300), dtype=torch.float64).log10()))
