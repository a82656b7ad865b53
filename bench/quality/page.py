"""Writes docs/figures/quality.md from the results of bench.quality."""

from collections.abc import Mapping
from typing import Any

from bench.quality.scores import show

READING = """\
`score` is the judge's: the share of right images, as the mean over GenEval's six categories. Each image is compared
with the first variant's image of the same prompt and seed. `apart from the first` is the difference of the scores.
`changed` counts the images whose verdict differs. PSNR is over all images, and of the worst one.

Intervals are 95 %, by bootstrap over prompts. An interval that holds zero says that these prompts show no difference,
not that there is none. Where no verdict changed, the interval has no width. Then 3 of as many images as were judged may
still change (the rule of three).

`emulated` rounds in PyTorch as a GPU would. `figures` starts one step at 1.55413, `paper` at pi/2."""

TIMES = """\
`seconds` are of one image of a prompt that the cache has seen. The ratio is to the first variant's time, in turn with
it: above 1 is slower. The time of `emulated` means nothing."""
UNTIMED = "Nothing was timed here: scores and distances do not depend on what else the machine does, times do."


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the Markdown page; the sheets of worst images are files next to it."""
    lines = [
        "# Quality by precision, steps and start angle",
        "",
        "For readers who choose a precision or a number of steps. `python -m bench.report` writes this page.",
        "",
    ]
    timed = any(result["latency_runs"] for result in results.values())
    lines += [READING, "", TIMES if timed else UNTIMED, ""]
    for name, result in results.items():
        facts = result["machine"]
        lines += [
            f"## {name}",
            "",
            f"`{result['model']}`, {result['prompts']} held-out captions, {result['seeds']} seed(s), guidance "
            f"{result['guidance']:g}; the first variant is `{result['compared_with']}`. {facts['cores']} cores of "
            f"{facts['cpu']}, load average {facts['load_average']} at the end"
            + (": ratios travel better than seconds." if result["latency_runs"] else "."),
            "",
            show(dict(result)),
            "",
        ]
        if result.get("worst"):
            lines += [
                "The images furthest from the first variant's (left of each), at the first number of steps:",
                "",
                f"![the worst images of each variant]({result['worst']})",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"
