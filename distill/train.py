"""Trains a recipe from nothing to a checkpoint that the server loads.

    python -m distill.train --recipe tiny --out runs/tiny      # hours on two cores; killed, it resumes
    python -m distill.train --recipe smoke --out runs/smoke    # all stages in minutes
    accelerate launch -m distill.train --recipe tiny --out DIR      # several devices

Stages, each resumed from its file in OUT: autoencoder, decoder (polishing), latents, teacher, student. The finished
checkpoint is OUT/checkpoint.
"""

import argparse
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from distill import autoencoder, pictures, student, teacher
from distill.evaluate import Report, evaluate, evaluation_prompts
from distill.export import write_checkpoint
from distill.latents import Latents, encode_scenes
from distill.published import Published, encode_pictures, open_published, write_distilled
from distill.recipe import RECIPES, Recipe
from distill.run import Stage
from distill.teacher import Teacher
from distill.text import SmallCaptioner
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer

SHEET_PROMPTS = 48
SHEET = 24
GUIDANCE = 4.5
STAGES = ("autoencoder", "decoder", "teacher", "student", "checkpoint")


class Run:
    """A recipe in a folder. Each property trains its stage, resumes it, or reads what is already done."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        published: Published | None = None,
        pictures_folder: Path | None = None,
    ) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.published, self.pictures_folder = published, pictures_folder
        self.prompts = evaluation_prompts(SHEET_PROMPTS, seed=recipe.seed, world=recipe.world)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        if self.published:
            return self.published.autoencoder
        return autoencoder.train(self.recipe, self.folder, self.accelerator)

    @cached_property
    def decoder(self) -> Autoencoder:
        """The autoencoder with its decoder polished: what is looked through and shipped."""
        if self.published:
            return self.published.autoencoder
        return autoencoder.polish(self.recipe, self.autoencoder, self.folder, self.accelerator)

    @cached_property
    def latents(self) -> Latents:
        numbers, size, path = self.recipe.teacher, self.recipe.image_size, self.folder / "latents.pt"
        if self.pictures_folder:
            return encode_pictures(self.pictures_folder, self.autoencoder, size, path)
        if numbers is None:
            raise ValueError(f"recipe {self.recipe.name} draws no world of its own; give --pictures DIR")
        return encode_scenes(self.recipe.world, self.autoencoder, size, numbers.latents, self.recipe.seed, path)

    @cached_property
    def teacher(self) -> Teacher:
        if self.published:
            return self.published.teacher
        return teacher.train(self.recipe, self.latents, self.folder, self.accelerator, self._examine_teacher)

    @cached_property
    def student(self) -> SprintTransformer:
        return student.train(
            self.recipe, self.teacher, self.latents, self.folder, self.accelerator, self._examine_student
        )

    @cached_property
    def checkpoint(self) -> Path:
        """Writes the checkpoint."""
        folder, side = self.folder / "checkpoint", self.recipe.image_size
        if self.published:
            write_distilled(folder, self.published, self.student)
            return folder
        captioner = self.teacher.caption
        assert isinstance(captioner, SmallCaptioner)
        sprint = {
            "instruction": False,
            "max_prompt_tokens": captioner.max_tokens,
            "default_size": [side, side],
            "guidance_trained": [min(self.recipe.distil.guidance), max(self.recipe.distil.guidance)],
        }
        write_checkpoint(folder, self.student, self.decoder, captioner.encoder, captioner.tokenizer, sprint)
        return folder

    def _judge(self, sampler: pictures.Sampler, stage: Stage, draw: bool) -> Report:
        generate = pictures.generator(self.recipe, sampler, self.decoder)
        made = list(generate([prompt.text for prompt in self.prompts], list(range(len(self.prompts)))))
        if draw:
            stage.sheet(pictures.as_tensor(made[:SHEET]))
        return evaluate(lambda *_: made, self.prompts, world=self.recipe.world)

    def _examine_teacher(self, taught: Teacher, stage: Stage) -> None:
        report = self._judge(pictures.teacher_sampler(self.recipe, taught), stage, draw=True)
        stage.report(score=report.mean, **report.categories)

    def _examine_student(self, transformer: SprintTransformer, stage: Stage) -> None:
        scores = {}
        if self.pictures_folder:  # the judge knows the tiny world only
            generate = pictures.generator(
                self.recipe, pictures.student_sampler(self.teacher, transformer, GUIDANCE, 1), self.decoder
            )
            captions = next(self.latents.batches(SHEET, self.recipe.seed, 0)).captions
            stage.sheet(pictures.as_tensor(list(generate(captions, list(range(SHEET))))))
            return
        for steps in (1, 2):
            sampler = pictures.student_sampler(self.teacher, transformer, GUIDANCE, steps)
            scores[f"score_{steps}"] = self._judge(sampler, stage, draw=steps == 1).mean
        stage.report(**scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--until", choices=STAGES, default="checkpoint", help="stop after this stage")
    parser.add_argument("--teacher", help="a published teacher: folder in the diffusers layout or hub id")
    parser.add_argument("--pictures", type=Path, help="folder of pictures with captions (same name, .txt)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    published = open_published(arguments.teacher, accelerator.device) if arguments.teacher else None
    getattr(
        Run(RECIPES[arguments.recipe](), arguments.out, accelerator, published, arguments.pictures), arguments.until
    )


if __name__ == "__main__":
    main()
