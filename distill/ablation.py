"""The paper's ablation (section 4.3, tables 3 to 6) at a small size: every row has the same teacher and updates.

    python -m distill.ablation --recipe tiny --run runs/tiny --seeds 5 --updates 300
    python -m distill.ablation --recipe tiny --run runs/ablation --model models/tiny --write distill/README.md

The first starts from the teacher of a finished run. With --model a teacher is recovered from that checkpoint
(distill.stages.recovered_teacher), so no run is needed. Each row and seed is written to RUN/ablation when it ends, and
not trained again; a stopped one resumes. Several processes share the rows of one folder. Prints tables and one JSON
line; rows that are missing are named.
"""

import argparse
import fcntl
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluation import samplers
from distill.evaluation.ablation_section import (
    BOTH,
    PARTS,
    STEPS,
    TEACHER,
    UNTRAINED,
    UNWRAPPED,
    AblationError,
    Verdicts,
    section,
    summary,
    write_section,
)
from distill.evaluation.scores import evaluation_prompts
from distill.recipes import RECIPES, DistilStageConfig, Recipe
from distill.stages import student
from distill.stages.recovered_teacher import STEPS as RECOVERY_STEPS
from distill.stages.recovered_teacher import Recovered, recover
from distill.train import GUIDANCE, Run
from distill.training.checkpoint_writer import write_json
from distill.world.judge import judge
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import SprintError

PROMPT_SEED = 11
NEVER = 1_000_000

SamplerOfSteps = Callable[[int], samplers.Sampler]


@dataclass(frozen=True)
class Settings:
    """The numbers that all rows of a folder share."""

    updates: int  # of the student, in each row
    prompts: int
    batch: int
    model: str | None  # whose teacher was recovered; None: a run's own
    recovery: int | None  # steps of it
    bfloat16: bool

    def claim(self, folder: Path) -> None:
        """Writes the settings into the folder of rows, or compares them. Raises AblationError if they are others."""
        path = folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != asdict(self):
            raise AblationError(f"{folder}: got rows of {path.read_text().strip()}; take another folder, or delete it")
        write_json(path, asdict(self))


def variants(config: DistilStageConfig, updates: int) -> dict[str, DistilStageConfig]:
    """Returns the rows by name. The discriminator's steps come on top of the student's updates.

    Rates rise, and decay if the recipe's do, over each row's own steps.
    """
    every = config.adversarial_every
    steps = updates * every // (every - 1)
    both = shortened(replace(config, adversarial_from=0, score_every=NEVER), steps)
    return {
        BOTH: both,
        PARTS[0]: shortened(replace(both, adversarial_weight=0.0), updates),
        PARTS[1]: replace(both, scm_weight=0.0),
        UNWRAPPED: replace(both, flow_to_trigflow=False),
    }


def shortened(config: DistilStageConfig, steps: int) -> DistilStageConfig:
    """Returns the stage with this many steps, its warm-ups no longer than a sixth and a third of them."""
    warmup, tangent_warmup = min(config.warmup, max(1, steps // 6)), min(config.tangent_warmup, max(1, steps // 3))
    return replace(config, steps=steps, warmup=warmup, tangent_warmup=tangent_warmup)


class Ablation:
    """Rows of one folder: trains those that are missing, and reads those that are done."""

    def __init__(self, recipe: Recipe, start: Recovered, settings: Settings, folder: Path) -> None:
        self.recipe, self.start, self.settings, self.folder = recipe, start, settings, folder
        self.prompts = evaluation_prompts(settings.prompts, seed=PROMPT_SEED, world=recipe.world)

    def path(self, name: str, seed: int) -> Path:
        return self.folder / f"{re.sub('[^a-z]+', '_', name.lower())}-{seed}" / "row.json"

    def read(self, name: str, seed: int) -> Verdicts | None:
        """Returns the verdicts of a row that is done, else None."""
        path = self.path(name, seed)
        verdicts: Verdicts | None = json.loads(path.read_text())["verdicts"] if path.exists() else None
        return verdicts

    def done(self, names: Sequence[str], seeds: int) -> dict[str, dict[int, Verdicts]]:
        """Returns name -> seed -> verdicts of the rows that are done; the references have the seed 0."""
        counts = {TEACHER: 1, UNTRAINED: 1} | dict.fromkeys(names, seeds)
        read = {name: {seed: self.read(name, seed) for seed in range(count)} for name, count in counts.items()}
        return {name: {seed: row for seed, row in rows.items() if row} for name, rows in read.items()}

    def score_references(self) -> None:
        """Scores the teacher and the student before its training, once."""
        teacher, copy = self.start.teacher, self.start.teacher.transformer
        for name in (TEACHER, UNTRAINED):
            with self._claimed(name, 0) as free:
                if free and name == TEACHER:
                    self._write(name, 0, {"teacher": self._judge(samplers.teacher_sampler(self.recipe, teacher))})
                elif free:
                    self._write(name, 0, self._by_steps(lambda n: samplers.student_sampler(teacher, copy, GUIDANCE, n)))

    def train(self, name: str, seed: int) -> None:
        """Trains, resumes and judges one row; does nothing if it is done, or if another process is at it.

        The seed decides captions, noise, angles and the discriminator's first weights, alike in all rows.
        """
        config = variants(self.recipe.distil, self.settings.updates)[name]
        base, teacher = self.recipe, self.start.teacher
        recipe = replace(base, seed=base.seed + 101 * seed, distil=replace(config, seed=base.distil.seed + 101 * seed))
        with self._claimed(name, seed) as free:
            if not free:
                return
            folder = self.path(name, seed).parent
            trained = student.train(recipe, teacher, self.start.latents, folder, Accelerator(), lambda *_: None)
            wrapped = config.flow_to_trigflow
            verdicts = self._by_steps(lambda n: samplers.student_sampler(teacher, trained, GUIDANCE, n, wrapped))
            self._write(name, seed, verdicts)
            (folder / "student.pt").unlink()

    @contextmanager
    def _claimed(self, name: str, seed: int) -> Iterator[bool]:
        """Yields True if the row is missing and no other process trains it; the claim ends with the process."""
        path = self.path(name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "claim").open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not path.exists()

    def _write(self, name: str, seed: int, verdicts: Verdicts) -> None:
        path = self.path(name, seed)
        write_json(path.with_suffix(".part"), {"name": name, "seed": seed, "verdicts": verdicts})
        path.with_suffix(".part").replace(path)

    def _by_steps(self, sampler: SamplerOfSteps) -> Verdicts:
        return {str(count): self._judge(sampler(count)) for count in STEPS}

    def _judge(self, sampler: samplers.Sampler) -> list[int]:
        torch.manual_seed(0)  # of the noise between steps
        generate = samplers.generator(self.recipe, sampler, self.start.autoencoder)
        images = generate([prompt.text for prompt in self.prompts], list(range(len(self.prompts))))
        world = self.recipe.world
        return [int(judge(x, p.requirement, world).correct) for p, x in zip(self.prompts, images, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainable = sorted(name for name, make in RECIPES.items() if make().teacher)
    parser.add_argument("--recipe", choices=trainable, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run; with --model any folder")
    parser.add_argument("--model", help="a finished checkpoint, whose teacher is recovered")
    parser.add_argument(
        "--recovery", type=int, default=RECOVERY_STEPS, help="steps of the recovery (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row (default 5)")
    parser.add_argument("--updates", type=int, default=300, help="of the student, in each row (default 300)")
    parser.add_argument("--prompts", type=int, default=192, help="held-out captions judged (default 192)")
    parser.add_argument("--batch", type=int, help="captions of an update (default: the recipe's)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: faster where the CPU has no such products")
    parser.add_argument("--unwrapped", action="store_true", help=f"one more row: {UNWRAPPED}")
    parser.add_argument("--report", action="store_true", help="train nothing: print what is done")
    parser.add_argument("--write", type=Path, help="a Markdown file whose section Ablation is replaced")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args(argv)
    if min(options.seeds, options.updates, options.prompts) < 1:
        parser.error("--seeds, --updates and --prompts: needed is 1 at least")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.recipe]()
    distil = replace(recipe.distil, batch=options.batch or recipe.distil.batch, bfloat16=not options.float32)
    recipe = replace(recipe, distil=distil)
    recovery = options.recovery if options.model else None
    settings = Settings(options.updates, options.prompts, distil.batch, options.model, recovery, distil.bfloat16)
    names = (BOTH, *PARTS, UNWRAPPED) if options.unwrapped else (BOTH, *PARTS)
    try:
        settings.claim(options.run / "ablation")
        if options.model:
            checkpoint, device = open_checkpoint(options.model), Accelerator().device
            start = recover(recipe, checkpoint, options.run, options.recovery, device)
        else:
            run = Run(recipe, options.run, Accelerator())
            start = Recovered(run.teacher, run.sharpened, run.latents)
        ablation = Ablation(recipe, start, settings, options.run / "ablation")
        if not options.report:
            ablation.score_references()
            for seed in range(options.seeds):
                for name in names:
                    ablation.train(name, seed)
        done = ablation.done(names, options.seeds)
        result = asdict(settings) | summary(done, [prompt.category for prompt in ablation.prompts])
        command = f"python -m distill.ablation {' '.join(sys.argv[1:] if argv is None else argv)}"
        text = section(result, command)
        if options.write:
            write_section(options.write, text)
    except SprintError as error:
        print(f"distill.ablation: {error}", file=sys.stderr)
        return 2
    print(text)
    missing = [f"{name}, seed {seed}" for name in names for seed in range(options.seeds) if seed not in done[name]]
    if missing:
        print(f"not done: {'; '.join(missing)}")
    print(json.dumps(result | {"missing": missing}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
