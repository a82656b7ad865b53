"""A resumable stage of a run, its EMA, and its files.

<out>/<stage>.pt          the state to resume from: weights, EMA, optimisers, step   (written atomically)
<out>/<stage>.jsonl       one line per report
<out>/<stage>_NNNNNN.png  contact sheets of sample images
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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


class Ema:
    """Exponential moving average of a module's parameters, for sampling and for the checkpoint.

    torch's AveragedModel would save other keys, and runs in progress could not resume.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the parameters. The decay rises with `step`, so that initial weights fade out."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in module.parameters()], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.values, strict=False)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Replaces the module's weights by the average inside the block."""
        own = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            module.load_state_dict(own, strict=False)


@dataclass
class Stage:
    """One stage of a run: its progress, its saved state and its reports."""

    folder: Path
    name: str
    steps: int
    parts: dict[str, Any]  # modules, optimisers and averages, by their key in the saved state
    main_process: bool = True
    step: int = 0
    seconds: float = 0.0
    _saved: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self) -> bool:
        """Loads the folder's state if there is one. Returns True if the stage is complete."""
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for name, part in self.parts.items():
                if isinstance(part, Ema):
                    for key, value in state[name].items():
                        part.values[key].copy_(value)
                else:
                    part.load_state_dict(state[name])
        return self.step >= self.steps

    def __iter__(self) -> Iterator[int]:
        """Yields the steps that are left; counts seconds, shows progress, saves every two minutes and at the end."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, disable=not self.main_process, mininterval=5)
        while self.step < self.steps:
            began = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - began
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
            state[name] = part.values if isinstance(part, Ema) else part.state_dict()
        save_atomically(state, self.path)

    def report(self, **values: float) -> None:
        """Appends one line to the log."""
        if self.main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in values.items()}
            with (self.folder / f"{self.name}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write(f"{self.name} {line}")

    def sheet(self, images: Tensor, columns: int = 8) -> None:
        """Writes images [N,3,H,W] in [-1,1] as one PNG."""
        if self.main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(contact_sheet(to_uint8(images), columns)).save(
                self.folder / f"{self.name}_{self.step:06d}.png"
            )


def save_atomically(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Saves beside `path` and renames, so that a kill leaves the last state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[N,3,H,W] in [-1,1] -> [N,H,W,3] uint8, rounded as in the server."""
    scaled = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def to_tensor(images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Tensor:
    """[N,H,W,3] uint8 -> [N,3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def contact_sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """[N,H,W,3] -> one image of all, row by row, with a gray border."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 4), columns * (width + 4), 3), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 4) + 2, (i % columns) * (width + 4) + 2
        sheet[top : top + height, left : left + width] = image
    return sheet


def learning_rate_factor(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Returns the factor of warm-up, plateau, and linear decay to 2 % over the last `decay_fraction` of the steps."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    if decay_fraction <= 0:
        return rising
    left = (steps - step) / (steps * decay_fraction)
    return rising * min(1.0, max(0.02, left))
