"""Trains a recipe from nothing to a checkpoint that the server loads.

    python -m distill.train --recipe tiny --out runs/tiny      # hours on two cores; killed, it resumes
    python -m distill.train --recipe smoke --out runs/smoke    # all stages in minutes
    accelerate launch -m distill.train --recipe tiny --out DIR      # several devices
    python -m distill.train --recipe tiny_again --again models/tiny --out runs/again    # a better student, in minutes

Each stage resumes from its file in OUT: autoencoder, decoder alone, latents and teacher in the wide world, latents and
teacher in the world itself (narrow), student, decoder again (sharpen). The checkpoint is OUT/checkpoint. Scores and
contact sheets on the way use the decoder before its last stage. --again distils a finished checkpoint once more: it
recovers a teacher (distill.stages.recovered_teacher), and trains student and decoder.
"""

import argparse
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluation import samplers
from distill.evaluation.scores import ScoreReport, evaluate, evaluation_prompts
from distill.recipes import RECIPES, Recipe, TeacherStageConfig
from distill.stages import autoencoder, decoder_finetuning, student, teacher
from distill.stages.published_teacher import PublishedTeacher, encode_images, open_published_teacher, write_distilled
from distill.stages.recovered_teacher import STEPS as RECOVERY_STEPS
from distill.stages.recovered_teacher import Recovered, recover
from distill.stages.teacher import Teacher, TrainingPhase
from distill.training.checkpoint_writer import write_checkpoint, write_weights
from distill.training.latents import Latents, encode_scenes
from distill.training.stage import Stage, to_tensor
from distill.training.text_encoder import SmallCaptioner
from distill.world.captions import vocabulary
from distill.world.scenes import World
from engines.checkpoints.checkpoint import open_checkpoint
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer

SHEET_PROMPTS = 48
SHEET = 24
GUIDANCE = 4.5
STAGES = ("autoencoder", "decoder", "teacher", "student", "sharpened", "checkpoint")


class Run:
    """A recipe in a folder. Each property trains its stage, resumes it, or loads its result."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        published: PublishedTeacher | None = None,
        images_folder: Path | None = None,
        again: Path | None = None,
    ) -> None:
        """again: folder of a finished checkpoint, which takes the place of all stages before the student."""
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.published, self.images_folder, self.again = published, images_folder, again
        self.prompts = evaluation_prompts(SHEET_PROMPTS, seed=recipe.seed, world=recipe.world)

    @cached_property
    def recovered(self) -> Recovered:
        """The start from a finished checkpoint."""
        assert self.again is not None
        checkpoint = open_checkpoint(str(self.again))
        return recover(self.recipe, checkpoint, self.folder, RECOVERY_STEPS, self.accelerator.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        if self.again:
            return self.recovered.autoencoder
        if self.published:
            return self.published.autoencoder
        return autoencoder.train(self.recipe, self.folder, self.accelerator)

    @cached_property
    def decoder(self) -> Autoencoder:
        """The autoencoder after the decoder's own stage, for scores on the way."""
        if self.again or self.published:
            return self.autoencoder
        return autoencoder.train_decoder(self.recipe, self.autoencoder, self.folder, self.accelerator)

    @cached_property
    def latents(self) -> Latents:
        """Latents of the world itself, for the student."""
        if self.again:
            return self.recovered.latents
        if self.images_folder:
            size, path = self.recipe.image_size, self.folder / "latents.pt"
            return encode_images(self.images_folder, self.autoencoder, size, path)
        config = self._teacher_config()
        if self.recipe.wide_world is None:
            return self._encode(self.recipe.world, config.latents, "latents.pt", self.recipe.seed)
        return self._encode(self.recipe.world, config.narrow_latents, "latents.pt", self.recipe.seed + 1)

    @cached_property
    def wide_latents(self) -> Latents:
        """Latents of the wide world if the recipe has one, for the teacher's first phase."""
        config, wide = self._teacher_config(), self.recipe.wide_world
        if wide is None:
            return self.latents
        if vocabulary(wide) != vocabulary(self.recipe.world):
            raise ValueError(f"recipe {self.recipe.name}: world and wide_world need the same words")
        return self._encode(wide, config.latents, "wide_latents.pt", self.recipe.seed)

    def _teacher_config(self) -> TeacherStageConfig:
        if self.recipe.teacher is None:
            raise ValueError(f"recipe {self.recipe.name} trains no teacher and renders no images; give --images DIR")
        return self.recipe.teacher

    def _encode(self, world: World, count: int, name: str, seed: int) -> Latents:
        return encode_scenes(world, self.autoencoder, self.recipe.image_size, count, seed, self.folder / name)

    @cached_property
    def teacher(self) -> Teacher:
        if self.again:
            return self.recovered.teacher
        if self.published:
            return self.published.teacher
        config = self._teacher_config()
        phases = [TrainingPhase("teacher", lambda: self.wide_latents, config.steps, 1.0, config.decay_fraction)]
        if self.recipe.wide_world is not None:
            narrow = TrainingPhase("narrow", lambda: self.latents, config.narrow_steps, config.narrow_rate, 1.0)
            phases.append(narrow)
        return teacher.train(self.recipe, phases, self.folder, self.accelerator, self._evaluate_teacher)

    @cached_property
    def student(self) -> SprintTransformer:
        """The student; the mean of the weights of several, each in its own folder, if the recipe says so."""
        if self.recipe.students == 1:
            return self._student(self.recipe, self.folder)
        made = []
        for index in range(self.recipe.students):
            distil = replace(self.recipe.distil, seed=self.recipe.distil.seed + index)
            folder = self.folder / f"student_{index}"
            folder.mkdir(exist_ok=True)
            made.append(self._student(replace(self.recipe, distil=distil, seed=self.recipe.seed + index), folder))
        states = [one.state_dict() for one in made]
        made[0].load_state_dict({key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]})
        return made[0]

    def _student(self, recipe: Recipe, folder: Path) -> SprintTransformer:
        return student.train(recipe, self.teacher, self.latents, folder, self.accelerator, self._evaluate_student)

    @cached_property
    def sharpened(self) -> Autoencoder:
        """The checkpoint's autoencoder, its decoder fine-tuned on the student's predictions."""
        decoder = deepcopy(self.decoder)
        return decoder_finetuning.train(self.recipe, decoder, self.teacher, self.student, self.folder, self.accelerator)

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, which this writes."""
        folder, side = self.folder / "checkpoint", self.recipe.image_size
        if self.published:
            write_distilled(folder, self.published.folder, self.student)
            return folder
        if self.again:
            write_distilled(folder, self.again, self.student)
            for name in ("model_index.json", "sprint.json"):
                shutil.copy(self.again / name, folder / name)
            write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", self.sharpened.state_dict())
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

    def _evaluate(self, sampler: samplers.Sampler, stage: Stage, sheet: bool) -> ScoreReport:
        generate = samplers.generator(self.recipe, sampler, self.decoder)
        images = list(generate([prompt.text for prompt in self.prompts], list(range(len(self.prompts)))))
        if sheet:
            stage.sheet(to_tensor(images[:SHEET]))
        return evaluate(lambda *_: images, self.prompts, world=self.recipe.world)

    def _evaluate_teacher(self, averaged: Teacher, stage: Stage) -> None:
        report = self._evaluate(samplers.teacher_sampler(self.recipe, averaged), stage, sheet=True)
        stage.report(score=report.mean, **report.categories)

    def _evaluate_student(self, transformer: SprintTransformer, stage: Stage) -> None:
        scores = {}
        if self.images_folder:  # the judge knows the tiny world only
            generate = samplers.generator(
                self.recipe, samplers.student_sampler(self.teacher, transformer, GUIDANCE, 1), self.decoder
            )
            captions = next(self.latents.batches(SHEET, self.recipe.seed, 0)).captions
            stage.sheet(to_tensor(list(generate(captions, list(range(SHEET))))))
            return
        for steps in (1, 2):
            sampler = samplers.student_sampler(self.teacher, transformer, GUIDANCE, steps)
            scores[f"score_{steps}"] = self._evaluate(sampler, stage, sheet=steps == 1).mean
        stage.report(**scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--until", choices=STAGES, default="checkpoint", help="stop after this stage")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--teacher", help="a published teacher: folder in the diffusers layout or hub id")
    start.add_argument("--again", type=Path, help="folder of a finished checkpoint to distil once more")
    parser.add_argument("--images", type=Path, help="folder of images with captions (same name, .txt)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    published = open_published_teacher(arguments.teacher, accelerator.device) if arguments.teacher else None
    run = Run(RECIPES[arguments.recipe](), arguments.out, accelerator, published, arguments.images, arguments.again)
    getattr(run, arguments.until)


if __name__ == "__main__":
    main()
