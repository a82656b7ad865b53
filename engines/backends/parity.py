"""How far an engine is from the fp32 reference, and how far it may be.

Distances are taken over all outputs together. SQNR is the reference's power over the error's, in dB: a cosine close to
one lets a transformer without its feed-forwards pass, SQNR does not. Pictures are compared in levels of uint8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engines.errors import ParityError


@dataclass(frozen=True)
class Difference:
    """Of one module's outputs. `relative` is max_abs over the reference's largest value; PSNR is against 255 levels."""

    max_abs: float
    mean_abs: float
    relative: float
    sqnr_db: float
    psnr_db: float | None = None  # of pixels only

    def to_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Gate:
    """What a module of some precision must keep: latents by `relative` or `sqnr_db`, pixels by `levels`, `psnr_db`."""

    relative: float | None = None
    sqnr_db: float | None = None
    levels: int | None = None
    psnr_db: float | None = None

    def check(self, name: str, found: Difference) -> str:
        """The bound that was kept, in words. Raises ParityError where it was not."""
        bounds = (
            [("relative error", found.relative, self.relative, False), ("SQNR", found.sqnr_db, self.sqnr_db, True)]
            if found.psnr_db is None
            else [("levels of 255", found.max_abs, self.levels, False), ("PSNR", found.psnr_db, self.psnr_db, True)]
        )
        for quantity, value, bound, at_least in bounds:
            if bound is None:
                continue
            kept = value >= bound if at_least else value <= bound
            requirement = f"{quantity} {'>=' if at_least else '<='} {bound:g}{' dB' if at_least else ''}"
            if not kept:  # NaN too
                raise ParityError(
                    f"{name}: too far from its reference: {quantity} is {value:.4g}, needed {requirement}"
                )
            return requirement
        raise ValueError(f"{name}: the gate bounds nothing of this kind")


# fp16 has 11 bits and bf16 has 8, 6 dB each; fp8's bound is for random weights, which have no outliers.
GATES: Mapping[str, Gate] = {
    "fp32": Gate(relative=1e-4, levels=1),
    "fp16": Gate(sqnr_db=55, psnr_db=45),
    "bf16": Gate(sqnr_db=35, psnr_db=35),
    "fp8": Gate(sqnr_db=25),
}
# Of the decoder with its wide convolutions in 8 bits, against itself in bf16; by the same measure bf16 is at 49 dB.
INT8_GATE = Gate(psnr_db=30)
# Of a module that was compiled, here or in an earlier process, against the module itself in the same type. Both round,
# each in its own order, so the bounds are wide; what a wrong entry of a cache gives is off by everything.
COMPILED_GATES: Mapping[torch.dtype, Gate] = {
    torch.float32: Gate(sqnr_db=40, psnr_db=40),
    torch.float16: Gate(sqnr_db=40, psnr_db=40),
    torch.bfloat16: Gate(sqnr_db=25, psnr_db=30),
}
# Of transformer and decoder in a row.
IMAGE_GATES: Mapping[str, Gate] = {
    "fp32": Gate(levels=2),
    "fp16": Gate(psnr_db=40),
    "bf16": Gate(psnr_db=35),
    "fp8": Gate(psnr_db=20),
}


def difference(reference: Tensor, found: Tensor) -> Difference:
    """Both of one shape and kind: floats, or uint8 pixels. An output that is not finite is infinitely far."""
    if reference.shape != found.shape:
        raise ParityError(f"shape: got {list(found.shape)}, the reference has {list(reference.shape)}")
    pixels = reference.dtype == torch.uint8
    expected, got = reference.cpu().double(), found.cpu().double()
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
    """Holds `run`, compiled from `module` in `dtype`, to it, on noise in the shapes of `inputs` [B, ...].

    The module runs row by row, so that it needs no more memory than one job. Raises ParityError.
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
    """Masks with everything kept, pixels of any level, times and scales between 0 and 1, the rest N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    if value.dtype == torch.bool:
        return torch.ones_like(value)
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator).to(value.device)
    draw = torch.rand if value.ndim == 1 else torch.randn
    return draw(value.shape, generator=generator).to(value.device, value.dtype)


def _decibels(power: float, noise: float) -> float:
    """10 log10 of the ratio, at most 200, so that equality can be written as JSON."""
    return min(200.0, 10 * float(torch.tensor(power / max(noise, 1e-300), dtype=torch.float64).log10()))
