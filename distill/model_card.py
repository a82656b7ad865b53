"""Scores a finished run's teacher and student, by category and with the spread over seeds, and writes the model card.

python -m distill.model_card --recipe tiny --run runs/tiny            # minutes; writes runs/tiny/checkpoint/README.md
python -m distill.model_card --recipe tiny_again --again models/tiny --run runs/again
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from distill.evaluation import samplers
from distill.evaluation.scores import ScoreReport, engine_generator, evaluate, evaluation_prompts
from distill.recipes import RECIPES, Recipe
from distill.train import GUIDANCE, Run
from distill.training.stage import contact_sheet
from distill.world.scenes import CATEGORIES
from engines.loader import load_engine

STEPS = (1, 2, 4)
SHEET = 32

CARD = """# {name}: a SANA-Sprint checkpoint small enough to ship

{size}x{size} images of coloured shapes on plain backgrounds, in one to four steps, from a network with the
published architecture (linear attention, QK-norm, guidance embedding, an f32c32 autoencoder, a Gemma-2 text encoder) at
a width of {width}. The server runs it by default, and its tests judge its images. Licence: Apache-2.0.

![held-out prompts, one step](samples.png)

## What it draws
Shapes {shapes}; colours {colours};
backgrounds {backgrounds} ({plain} where none is named); one thing, also small or
big; two things, in relation (left of, right of, above, below) or side by side; two to four of a kind. It ignores
other words. Guidance {low:g} to {high:g} is trained; w stands for 1 + {gain:g} (w - 1) of the teacher.

## Scores
{prompts} held-out captions (combinations that training never shows), {seeds} seeds each, judged by
`distill/world/judge.py`: the share of images in which number, shapes, colours, relation and background are all right.

{table}

The teacher runs {teacher_steps} Euler steps with guidance {teacher_guidance:g}. The student before its training, which
is the teacher in one step, scores {untrained:.3f}.

## Training
{training}

| stage | steps | batch | hours |
|---|---|---|---|
{stages}

Measured on one core of a two-core CPU machine. Parts in bfloat16: {megabytes:.1f} MB in all.
"""

FROM_NOTHING = """\
`python -m distill.train --recipe {name} --out runs/{name}`; data: endless renderings (`distill/world/rendering.py`).
The teacher learns in a wider world first (`wide_world` of the recipe), then in this one (narrow). The last stage trains
the decoder once more, on the student's predictions (sharpen). `distill/LOG.md` lists every attempt with its figures."""

AGAIN = """\
`python -m distill.train --recipe {name} --again CHECKPOINT --out runs/again`, where CHECKPOINT is what
`--recipe tiny` trains in 1.7 hours; autoencoder and text encoder are its own. A teacher is recovered from its student
(`distill/stages/recovered_teacher.py`), and {students} students of other seeds are distilled from that. The student
is the mean of their weights. The decoder is trained once more on its predictions (sharpen). `distill/LOG.md` lists
every attempt with its figures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--again", type=Path, help="the checkpoint that the run distilled once more")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]()
    run = Run(recipe, arguments.run, Accelerator(), again=arguments.again)
    folder = run.checkpoint
    prompts = evaluation_prompts(arguments.prompts, seed=23, world=recipe.world)
    seeds = range(arguments.seeds)
    teacher = samplers.generator(recipe, samplers.teacher_sampler(recipe, run.teacher), run.sharpened)
    reports = {f"teacher, {recipe.teacher_sampling_steps} steps": evaluate(teacher, prompts, seeds, recipe.world)}
    engine = load_engine(str(folder))
    for steps in STEPS:
        generate = engine_generator(engine, steps, GUIDANCE)
        name = f"student, {steps} step{'s' if steps > 1 else ''}"
        reports[name] = evaluate(generate, prompts, seeds, recipe.world)
        if steps == 1:
            images = list(generate([prompt.text for prompt in prompts[:SHEET]], list(range(SHEET))))
            Image.fromarray(contact_sheet(np.stack(images), 8)[::2, ::2]).save(folder / "samples.png")
    start = samplers.student_sampler(run.teacher, run.teacher.transformer, GUIDANCE, 1)
    generate = samplers.generator(recipe, start, run.sharpened)
    untrained = evaluate(generate, prompts[:120], (0,), recipe.world).mean
    training = (FROM_NOTHING if arguments.again is None else AGAIN).format(name=recipe.name, students=recipe.students)
    (folder / "README.md").write_text(card(recipe, arguments.run, folder, reports, untrained, training))
    print(table(reports))
    print(json.dumps({name: asdict(report) for name, report in reports.items()}))


def table(reports: dict[str, ScoreReport]) -> str:
    """Formats a column per category and a row per model, with mean and standard deviation over seeds last."""
    rows = [f"| | {' | '.join(CATEGORIES)} | mean (std over seeds) |", "|---" * (len(CATEGORIES) + 2) + "|"]
    for name, report in reports.items():
        cells = " | ".join(f"{report.categories[category]:.3f}" for category in CATEGORIES)
        rows.append(f"| {name} | {cells} | **{report.mean:.3f}** ({report.spread:.3f}) |")
    return "\n".join(rows)


def card(
    recipe: Recipe, run: Path, folder: Path, reports: dict[str, ScoreReport], untrained: float, training: str
) -> str:
    """Returns the text of the model card. run: folder of the stages' files. training: the section on them."""
    assert recipe.autoencoder is not None
    assert recipe.teacher is not None
    stages = []
    batches = {
        "autoencoder": recipe.autoencoder.batch,
        "decoder": recipe.autoencoder.batch,
        "teacher": recipe.teacher.batch,
        "narrow": recipe.teacher.batch,
        "recovered": recipe.teacher.batch,
        "student": recipe.distil.batch,
        "sharpen": recipe.autoencoder.sharpen_batch,
    }
    for name, batch in batches.items():
        files = [run / f"{name}.pt", *run.glob(f"{name}_*/{name}.pt")]
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files if file.exists()]
        if not states:  # a stage of another kind of run
            continue
        steps, hours = " + ".join(str(state["step"]) for state in states), sum(s["seconds"] for s in states) / 3600
        stages.append(f"| {name} | {steps} | {batch} | {hours:.2f} |")
    world, any_report = recipe.world, next(iter(reports.values()))
    return CARD.format(
        name=recipe.name,
        size=recipe.image_size,
        width=recipe.teacher.architecture.dim,
        shapes=", ".join(world.shapes),
        colours=", ".join(name for name, _ in world.colours),
        backgrounds=", ".join(name for name, _ in world.backgrounds),
        plain=world.plain_background,
        low=min(recipe.distil.guidance),
        high=max(recipe.distil.guidance),
        gain=recipe.distil.guidance_gain,
        prompts=any_report.prompts,
        seeds=len(any_report.seeds),
        table=table(reports),
        teacher_steps=recipe.teacher_sampling_steps,
        teacher_guidance=recipe.teacher_guidance,
        untrained=untrained,
        training=training,
        stages="\n".join(stages),
        megabytes=sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6,
    )


if __name__ == "__main__":
    main()
