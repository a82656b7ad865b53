"""Trains a recipe from nothing to a checkpoint that the server loads.

    python -m distill.train --recipe tiny --out runs/tiny      # hours on two cores; killed, it resumes
    python -m distill.train --recipe smoke --out runs/smoke    # all stages in minutes
    accelerate launch -m distill.train --recipe tiny --out DIR      # several devices

Stages, each resumed from its file in OUT: autoencoder, decoder (polishing), latents and teacher in the wide world,
latents and teacher in the world itself (narrow), student, decoder again (sharpen). The checkpoint is OUT/checkpoint.
Scores and sheets on the way are seen through the decoder before its last stage.
"""

import argparse
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluation import samplers
from distill.evaluation.scores import Report, evaluate, evaluation_prompts
from distill.recipes import RECIPES, Recipe, TeacherStage
from distill.stages import autoencoder, decoder_finetuning, student, teacher
from distill.stages.published_teacher import Published, encode_pictures, open_published, write_distilled
from distill.stages.teacher import Lesson, Teacher
from distill.training.checkpoint_writer import write_checkpoint
from distill.training.latents import Latents, encode_scenes
from distill.training.stage import Stage
from distill.training.text_encoder import SmallCaptioner
from distill.world.captions import vocabulary
from distill.world.scenes import World
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer

SHEET_PROMPTS = 48
SHEET = 24
GUIDANCE = 4.5
STAGES = ("autoencoder", "decoder", "teacher", "student", "sharpened", "checkpoint")


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
        """The autoencoder with its decoder polished: what is looked through on the way."""
        if self.published:
            return self.published.autoencoder
        return autoencoder.polish(self.recipe, self.autoencoder, self.folder, self.accelerator)

    @cached_property
    def latents(self) -> Latents:
        """Of the world itself: what the student trains on."""
        if self.pictures_folder:
            size, path = self.recipe.image_size, self.folder / "latents.pt"
            return encode_pictures(self.pictures_folder, self.autoencoder, size, path)
        numbers = self._teacher_stage()
        if self.recipe.wide_world is None:
            return self._encoded(self.recipe.world, numbers.latents, "latents.pt", self.recipe.seed)
        return self._encoded(self.recipe.world, numbers.narrow_latents, "latents.pt", self.recipe.seed + 1)

    @cached_property
    def wide_latents(self) -> Latents:
        """Of the wide world, where the recipe has one: what the teacher's first lesson trains on."""
        numbers, wide = self._teacher_stage(), self.recipe.wide_world
        if wide is None:
            return self.latents
        if vocabulary(wide) != vocabulary(self.recipe.world):
            raise ValueError(f"recipe {self.recipe.name}: world and wide_world need the same words")
        return self._encoded(wide, numbers.latents, "wide_latents.pt", self.recipe.seed)

    def _teacher_stage(self) -> TeacherStage:
        if self.recipe.teacher is None:
            raise ValueError(f"recipe {self.recipe.name} draws no world of its own; give --pictures DIR")
        return self.recipe.teacher

    def _encoded(self, world: World, count: int, name: str, seed: int) -> Latents:
        return encode_scenes(world, self.autoencoder, self.recipe.image_size, count, seed, self.folder / name)

    @cached_property
    def teacher(self) -> Teacher:
        if self.published:
            return self.published.teacher
        numbers = self._teacher_stage()
        lessons = [Lesson("teacher", lambda: self.wide_latents, numbers.steps, 1.0, numbers.decay_fraction)]
        if self.recipe.wide_world is not None:
            narrow = Lesson("narrow", lambda: self.latents, numbers.narrow_steps, numbers.narrow_rate, 1.0)
            lessons.append(narrow)
        return teacher.train(self.recipe, lessons, self.folder, self.accelerator, self._examine_teacher)

    @cached_property
    def student(self) -> SprintTransformer:
        return student.train(
            self.recipe, self.teacher, self.latents, self.folder, self.accelerator, self._examine_student
        )

    @cached_property
    def sharpened(self) -> Autoencoder:
        """The autoencoder that ships: its decoder has seen what the student predicts."""
        decoder, trained = deepcopy(self.decoder), self.student
        return decoder_finetuning.train(self.recipe, decoder, self.teacher, trained, self.folder, self.accelerator)

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
        write_checkpoint(folder, self.student, self.sharpened, captioner.encoder, captioner.tokenizer, sprint)
        return folder

    def _judge(self, sampler: samplers.Sampler, stage: Stage, draw: bool) -> Report:
        generate = samplers.generator(self.recipe, sampler, self.decoder)
        made = list(generate([prompt.text for prompt in self.prompts], list(range(len(self.prompts)))))
        if draw:
            stage.sheet(samplers.as_tensor(made[:SHEET]))
        return evaluate(lambda *_: made, self.prompts, world=self.recipe.world)

    def _examine_teacher(self, taught: Teacher, stage: Stage) -> None:
        report = self._judge(samplers.teacher_sampler(self.recipe, taught), stage, draw=True)
        stage.report(score=report.mean, **report.categories)

    def _examine_student(self, transformer: SprintTransformer, stage: Stage) -> None:
        scores = {}
        if self.pictures_folder:  # the judge knows the tiny world only
            generate = samplers.generator(
                self.recipe, samplers.student_sampler(self.teacher, transformer, GUIDANCE, 1), self.decoder
            )
            captions = next(self.latents.batches(SHEET, self.recipe.seed, 0)).captions
            stage.sheet(samplers.as_tensor(list(generate(captions, list(range(SHEET))))))
            return
        for steps in (1, 2):
            sampler = samplers.student_sampler(self.teacher, transformer, GUIDANCE, steps)
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
