"""The section Ablation of distill/README.md: scores over seeds, and what both objectives gain over each alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.evaluation.intervals import Interval, crossed_interval
from engines.errors import SprintError

BOTH = "sCM + LADD"
PARTS = ("sCM alone", "LADD alone")
UNWRAPPED = "sCM + LADD, without the TrigFlow wrap"
UNTRAINED = "untrained: the wrapped teacher"
TEACHER = "the teacher itself"
STEPS = (1, 2)

Verdicts = dict[str, list[int]]  # number of steps -> 1 for each prompt whose image is right


class AblationError(SprintError):
    """A folder of other rows, or a page without the section."""


def summary(done: Mapping[str, Mapping[int, Verdicts]], categories: Sequence[str]) -> dict[str, Any]:
    """Returns intervals of the rows, and of what both parts gain over each alone, paired by seed and prompt.

    done: name -> seed -> verdicts on prompts of `categories`.
    """

    def values(name: str, steps: str, chosen: Sequence[int]) -> NDArray[np.float64]:
        return np.asarray([done[name][seed][steps] for seed in chosen], np.float64)

    rows, apart = {}, {}
    for name, verdicts in done.items():
        if chosen := sorted(verdicts):
            intervals = {at: crossed_interval(values(name, at, chosen), categories) for at in verdicts[chosen[0]]}
            rows[name] = {"seeds": len(chosen), "scores": intervals}
    for name in PARTS:
        if chosen := sorted(done.get(BOTH, {}).keys() & done.get(name, {}).keys()):
            gains = {str(n): values(BOTH, str(n), chosen) - values(name, str(n), chosen) for n in STEPS}
            apart[name] = {
                "seeds": len(chosen),
                "scores": {steps: crossed_interval(gain, categories) for steps, gain in gains.items()},
                "by_seed": {steps: gain.mean(1).round(4).tolist() for steps, gain in gains.items()},
            }
    return {"rows": rows, "apart": apart}


def section(result: Mapping[str, Any], command: str) -> str:
    """Returns the section of distill/README.md, with the verdict that the intervals allow."""
    rows, apart = result["rows"], result["apart"]
    origin = "of the run itself" if result["model"] is None else f"recovered from `{result['model']}`"
    lines = [
        f"Every row starts at the same teacher, {origin} (`LOG.md`), and updates its student {result['updates']} times "
        f"with batches of {result['batch']}.",
        f"The score is the mean over categories of {result['prompts']} held-out prompts. The 95 % intervals are over "
        "seeds and prompts.",
        "",
        "| | seeds | 1 step | 95 % | 2 steps | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name != TEACHER:
            lines.append(
                f"| {name} | {row['seeds']} | {' | '.join(_cells(row['scores'][str(n)], '.3f') for n in STEPS)} |"
            )
    lines += [
        "",
        "Both together less each alone, paired by seed and prompt:",
        "",
        "| apart from | seeds | 1 step | 95 % | 2 steps | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in apart.items():
        lines.append(
            f"| {name} | {row['seeds']} | {' | '.join(_cells(row['scores'][str(n)], '+.3f') for n in STEPS)} |"
        )
    lines.append("")
    for count in STEPS:
        found = [f"{_verdict(row['scores'][str(count)])} {name}" for name, row in apart.items()]
        if found:
            lines.append(f"In {count} step{'s' * (count > 1)}, both together {' and '.join(found)}.")
    if TEACHER in rows:
        lines.append(f"The teacher itself scores {rows[TEACHER]['scores']['teacher'].mean:.3f}.")
    return "\n".join([*lines, "", f"`{command}` writes this section; `LOG.md` gives its limits.", ""])


def _cells(interval: Interval, form: str) -> str:
    mean, low, high = (format(value, form) for value in interval)
    return f"{mean} | {low} to {high}"


def _verdict(difference: Interval) -> str:
    if difference.holds_zero:
        return "are not shown to differ from"
    return "beat" if difference.low > 0 else "lose to"


def write_section(path: Path, text: str) -> None:
    """Replaces what stands below `## Ablation` up to the next heading. Raises AblationError without that heading."""
    before, heading, rest = path.read_text().partition("## Ablation\n")
    if not heading:
        raise AblationError(f"{path}: got no heading '## Ablation', needed to know where the table goes")
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before}{heading}\n{text}{following}{after}")
