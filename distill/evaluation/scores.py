"""Scores an image generator on held-out captions of the tiny world: GenEval's six categories, judged from pixels.

    python -m distill.evaluation.scores --model models/tiny --steps 1 --prompts 500 --seeds 3

prints a table and, as its last line, one JSON document. A generator is any function of type `Generate`.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from distill.world.captions import caption_of
from distill.world.judge import judge
from distill.world.scenes import CATEGORIES, Requirement, World, WorldError, sample_request
from engines.types import Engine, Job, Pixels

Generate = Callable[[list[str], list[int]], Iterable[Pixels]]  # captions and noise seeds to one image each

SEED_STRIDE = 1_000_003  # prompt i of evaluation seed s has the noise seed s * SEED_STRIDE + i
ATTEMPTS = 20  # to draw a new caption


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption of a held-out combination, and the requirement that a right image meets."""

    text: str
    category: str
    requirement: Requirement


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Shares of right images, 0 to 1. `mean` is over categories (as GenEval), then over seeds."""

    prompts: int
    seeds: tuple[int, ...]
    categories: dict[str, float]
    category_spread: dict[str, float]
    mean: float
    spread: float  # sample standard deviation of the mean over seeds; 0 for one seed
    mean_by_seed: tuple[float, ...]
    mistakes: dict[str, int]  # the most frequent reasons with their counts

    def table(self) -> str:
        """Markdown: a row for each category and for the mean."""
        rows = [
            f"| {name} | {self.categories[name]:.3f} | {self.category_spread[name]:.3f} |" for name in self.categories
        ]
        head = ["| category | score | std over seeds |", "|---|---|---|"]
        return "\n".join([*head, *rows, f"| **mean** | **{self.mean:.3f}** | {self.spread:.3f} |"])


def evaluation_prompts(count: int, seed: int = 0, world: World | None = None) -> list[Prompt]:
    """Draws captions of held-out combinations, the six categories in turn; repeats them only if words run out."""
    world = world or World()
    rng = np.random.default_rng((seed, 0xE7A1))
    prompts: list[Prompt] = []
    texts: set[str] = set()
    for index in range(count):
        category = CATEGORIES[index % len(CATEGORIES)]
        for _ in range(ATTEMPTS):
            requirement = sample_request(world, rng, category, "held_out")
            text = caption_of(requirement, rng)
            if text not in texts:
                break
        texts.add(text)
        prompts.append(Prompt(text, category, requirement))
    return prompts


def evaluate(
    generate: Generate, prompts: Sequence[Prompt], seeds: Sequence[int] = (0,), world: World | None = None
) -> ScoreReport:
    """Judges one image for every prompt and seed. Each call of `generate` receives all prompts of one seed.

    Raises WorldError without prompts or seeds, or when the generator returns too few images.
    """
    if not prompts or not seeds:
        raise WorldError(f"evaluate: got {len(prompts)} prompts and {len(seeds)} seeds, needed is one of each at least")
    mistakes: Counter[str] = Counter()
    scores: list[dict[str, float]] = []
    for seed in seeds:
        right: Counter[str] = Counter()
        count = 0
        images = generate([p.text for p in prompts], [seed * SEED_STRIDE + i for i in range(len(prompts))])
        for prompt, pixels in zip(prompts, images, strict=False):
            verdict = judge(pixels, prompt.requirement, world)
            right[prompt.category] += verdict.correct
            mistakes.update(f"{prompt.category}: {reason}" for reason in verdict.reasons)
            count += 1
        if count < len(prompts):
            raise WorldError(f"generate: got {count} images for {len(prompts)} prompts, needed is one for each")
        totals = Counter(prompt.category for prompt in prompts)
        scores.append({name: right[name] / totals[name] for name in CATEGORIES if totals[name]})
    names = list(scores[0])
    means = tuple(statistics.fmean(score.values()) for score in scores)
    return ScoreReport(
        prompts=len(prompts),
        seeds=tuple(seeds),
        categories={name: statistics.fmean(score[name] for score in scores) for name in names},
        category_spread={name: _spread([score[name] for score in scores]) for name in names},
        mean=statistics.fmean(means),
        spread=_spread(means),
        mean_by_seed=means,
        mistakes=dict(mistakes.most_common(10)),
    )


def engine_generator(engine: Engine, steps: int, guidance_scale: float, size: int | None = None) -> Generate:
    """Runs an engine at size x size pixels (its default size when None), in batches as large as it allows."""
    width, height = (size, size) if size else engine.limits.default_size

    def generate(texts: list[str], seeds: list[int]) -> Iterator[Pixels]:
        jobs = [Job(text, seed, width, height, steps, guidance_scale) for text, seed in zip(texts, seeds, strict=True)]
        return run_jobs(engine, jobs)

    return generate


def run_jobs(engine: Engine, jobs: Sequence[Job]) -> Iterator[Pixels]:
    """Yields the image of each job, in batches as large as the engine allows."""
    for first in tqdm(range(0, len(jobs), engine.limits.max_batch), unit="batch", leave=False):
        for image in engine.generate(jobs[first : first + engine.limits.max_batch]):
            yield image.pixels


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m distill.evaluation.scores", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--prompts", type=int, default=500, help="held-out captions (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="images for each caption (default 3)")
    parser.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: the checkpoint's)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--max-batch", type=int, default=8)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    from engines.loader import load_engine  # loads torch, which the judge's users need not have

    options = _arguments(argv)
    engine = load_engine(options.model, backend=options.backend, max_batch=options.max_batch)
    try:
        generate = engine_generator(engine, options.steps, options.guidance, options.size)
        report = evaluate(generate, evaluation_prompts(options.prompts), range(options.seeds))
    finally:
        engine.close()
    print(report.table())
    settings = {"model": options.model, "steps": options.steps, "guidance": options.guidance}
    print(json.dumps({**settings, "backend": engine.info.backend, **asdict(report)}))


if __name__ == "__main__":
    main()
