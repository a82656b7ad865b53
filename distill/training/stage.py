"""A run folder: state that survives a kill at any moment, a log one can plot, sample sheets one can look at.

<out>/<stage>.pt        everything needed to go on: weights, EMA, optimisers, step   (written aside, then renamed)
<out>/<stage>.jsonl     one line per report
<out>/<stage>_NNNNNN.png  sample sheets
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

SAVE_SECONDS = 120.0


class Average:
    """Exponential moving average of a module's parameters: what is sampled from and shipped."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """The decay ramps up with `step`, so that the average forgets the initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = list(self.values.values()), [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.values, strict=False)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """The average in place of the module's own weights, for as long as the block lasts."""
        own = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            module.load_state_dict(own, strict=False)


@dataclass
class Stage:
    """One stage of a run: where it stands, how it reports and where it saves."""

    folder: Path
    name: str
    steps: int
    parts: dict[str, Any]  # modules, optimisers and averages: whatever has a state
    main_process: bool = True
    step: int = 0
    seconds: float = 0.0
    _saved: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self) -> bool:
        """Continues from the folder's state, if there is one. Returns whether the stage is already done."""
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for name, part in self.parts.items():
                if isinstance(part, Average):
                    for key, value in state[name].items():
                        part.values[key].copy_(value)
                else:
                    part.load_state_dict(state[name])
        return self.step >= self.steps

    def __iter__(self) -> Iterator[int]:
        """Steps from where the run stands. Counts seconds, draws the bar, saves every two minutes and at the end."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, disable=not self.main_process, mininterval=5)
        while self.step < self.steps:
            begun = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - begun
            bar.update()
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        bar.close()
        self.save()

    def save(self) -> None:
        self._saved = time.monotonic()
        if not self.main_process:
            return
        state: dict[str, Any] = {"step": self.step, "seconds": self.seconds}
        for name, part in self.parts.items():
            state[name] = part.values if isinstance(part, Average) else part.state_dict()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        torch.save(state, aside)
        os.replace(aside, self.path)

    def report(self, **values: float) -> None:
        """Appends one line to the log."""
        if self.main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in values.items()}
            with (self.folder / f"{self.name}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write(f"{self.name} {line}")

    def sheet(self, pictures: Tensor, columns: int = 8) -> None:
        """Writes [N,3,H,W] in [-1,1] as one PNG."""
        if self.main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(contact_sheet(to_uint8(pictures), columns)).save(
                self.folder / f"{self.name}_{self.step:06d}.png"
            )


def to_uint8(pictures: Tensor) -> NDArray[np.uint8]:
    """[N,3,H,W] in [-1,1] -> [N,H,W,3] uint8, rounded as the server rounds."""
    scaled = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """[N,H,W,3] uint8 -> [N,3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def contact_sheet(pictures: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """[N,H,W,3] -> one picture, row by row, with a gray rim."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 4), columns * (width + 4), 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + 4) + 2, (i % columns) * (width + 4) + 2
        sheet[top : top + height, left : left + width] = picture
    return sheet


def learning_rate_factor(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Warm-up, plateau, linear decay to 2 % over the last `decay_fraction` of the steps."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    if decay_fraction <= 0:
        return rising
    left = (steps - step) / (steps * decay_fraction)
    return rising * min(1.0, max(0.02, left))
