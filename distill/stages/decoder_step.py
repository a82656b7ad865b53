"""One step of a stage that trains a decoder: loss, update, average, report and sheet."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.stages.autoencoder import reconstruction_loss
from distill.training.stage import Ema, Stage

REPORT_EVERY = 50
SHEET_EVERY = 500


@dataclass(frozen=True)
class DecoderUpdate:
    """The parts that a step changes. weights: of edges and of squares in autoencoder.reconstruction_loss."""

    stage: Stage
    accelerator: Accelerator
    decoder: nn.Module
    optimizer: torch.optim.Optimizer
    average: Ema
    weights: tuple[float, float]

    def step(self, output: Tensor, target: Tensor) -> None:
        """Moves the decoder from `output` towards `target`, both [B,3,H,W] in [-1,1]."""
        loss = reconstruction_loss(output, target, *self.weights)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.decoder, self.stage.step)
        done = self.stage.step + 1
        if done % REPORT_EVERY == 0:
            self.stage.report(loss=loss.item(), gradient=float(norm))
        if done % SHEET_EVERY == 0:
            self.stage.sheet(torch.cat([target, output.detach()]), len(target))
