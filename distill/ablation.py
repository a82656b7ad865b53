"""The paper's ablation (section 4.3, tables 3 to 6) at a small size: every row has the same teacher and training time.

    python -m distill.ablation --recipe tiny --run runs/tiny --seconds 300

reads a finished run, writes each variant to RUN/ablation/<name>, and prints a table and one JSON line.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluation import samplers
from distill.evaluation.scores import evaluate, evaluation_prompts
from distill.recipes import RECIPES, DistilStageConfig
from distill.stages import student
from distill.train import GUIDANCE, Run

UNLIMITED = 1_000_000


def variants(config: DistilStageConfig, seconds: float) -> dict[str, DistilStageConfig]:
    """Returns the rows by name: both losses from the first step, each alone, and both without the wrap."""
    both = replace(
        config, adversarial_from=0, decay_fraction=0.0, steps=UNLIMITED, score_every=UNLIMITED, seconds=seconds
    )
    return {
        "sCM + LADD": both,
        "sCM alone": replace(both, adversarial_weight=0.0),
        "LADD alone": replace(both, scm_weight=0.0),
        "sCM + LADD, without the TrigFlow wrap": replace(both, flow_to_trigflow=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--seconds", type=float, default=300, help="training time of each row (default 300)")
    parser.add_argument("--prompts", type=int, default=96, help="held-out captions judged (default 96)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = Run(RECIPES[arguments.recipe](), arguments.run, Accelerator())
    prompts = evaluation_prompts(arguments.prompts, seed=11, world=run.recipe.world)
    rows: dict[str, dict[str, float]] = {}
    for name, config in variants(run.recipe.distil, arguments.seconds).items():
        folder = arguments.run / "ablation" / name.replace(" ", "_").replace(",", "")
        recipe = replace(run.recipe, distil=config)
        transformer = student.train(recipe, run.teacher, run.latents, folder, run.accelerator, lambda *_: None)
        rows[name] = {"steps": torch.load(folder / "student.pt", weights_only=True)["step"]}
        for count in (1, 2):
            sampler = samplers.student_sampler(run.teacher, transformer, GUIDANCE, count, config.flow_to_trigflow)
            generate = samplers.generator(run.recipe, sampler, run.sharpened)
            rows[name][f"score_{count}"] = evaluate(generate, prompts, world=run.recipe.world).mean
    print("| | training steps | score, 1 step | score, 2 steps |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['steps']:.0f} | {row['score_1']:.3f} | {row['score_2']:.3f} |")
    print(json.dumps({"seconds": arguments.seconds, "prompts": arguments.prompts, "rows": rows}))


if __name__ == "__main__":
    main()
