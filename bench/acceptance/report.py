"""Renders an acceptance run as a page in Markdown."""

from typing import Any

from bench.harness.summary import table
from bench.roofline.published import PAPER


def show(found: dict[str, Any]) -> str:
    """Returns the page in Markdown."""
    steps = found["steps"]
    head = f"# Acceptance on {found['card']}"
    told = found["machine"]
    where = f"{told['date']}, revision {told['revision']}, torch {told['torch']}, driver {found['driver'] or 'unknown'}"
    rows = [[s["model"], s["name"], s["outcome"], s["seconds"], _summary(s)] for s in steps]
    parts = [head, where, f"`{found['command']}`", table(("model", "step", "outcome", "s", "found"), rows)]
    times = [row | {"model": step["model"]} for step in steps for row in step["rows"]]
    if times:
        columns = (
            "model",
            "size",
            "steps",
            "batch",
            "who",
            "how",
            "text, s",
            "denoise, s",
            "decode, s",
            "total p50, s",
        )
        parts += [
            "Medians; the paper's figure, in milliseconds, stands beside one picture at 1024x1024 on the card it used.",
            table((*columns, "total p95, s", "pictures/s", "paper, ms"), [_time(row, found["card"]) for row in times]),
        ]
    paper = [[one["device"], one["stage"], one["steps"], one["milliseconds"]] for one in found["paper"]]
    parts += [
        "What the paper (arXiv 2503.09641) measured at 1024x1024, one picture, bf16, in milliseconds:",
        table(("device", "stage", "steps", "ms"), paper),
    ]
    return "\n\n".join(parts) + "\n"


def _time(row: dict[str, Any], card: str) -> list[object]:
    width, height = row["size"]
    cells = [row["model"], f"{width}x{height}", row["steps"], row["batch"], row["who"], row["how"]]
    if "refused" in row:
        return [*cells, row["refused"], None, None, None, None, None, None]
    seconds = row["seconds"]
    medians = [seconds[stage]["p50"] for stage in ("text", "denoise", "decode", "total")]
    published = (width, height) == (1024, 1024) and row["batch"] == 1 and "0.6b" in row["model"].lower()
    paper = _paper(card, row["steps"]) if published else None
    return [*cells, *medians, seconds["total"]["p95"], row["pictures_per_second"], paper]


def _paper(card: str, steps: int) -> str | None:
    """Returns the paper's milliseconds for a whole image on this card; None without a figure."""
    for (name, stage), by_steps in PAPER.items():
        if stage == "total" and name.split()[0 if "RTX" not in name else 1] in card:
            return by_steps.get(steps)
    return None


def _summary(step: dict[str, Any]) -> str:
    """Returns a step's figures, or its reason, as the text of a table cell."""
    if step["reason"]:
        return str(step["reason"]).replace("|", "/")
    figures = step["figures"]
    if step["name"] == "activation ranges":
        return "; ".join(f"{name} {one['peak']:.4g} ({one['part']})" for name, one in figures.items())
    if step["name"].startswith("build"):
        modules = (
            f"{name} {one['precision']} {one['bytes'] / 1e6:.0f} MB {one['parity'].get('gate', '')}"
            for name, one in figures["modules"].items()
        )
        return f"{figures['seconds']:.0f} s by {figures['vendor']}: " + "; ".join(modules)
    if step["name"].startswith("latency"):
        return f"{figures['backend']}, {figures['precision']}, at most {figures['peak_bytes'] / 1e9:.2f} GB"
    return "; ".join(f"{name} {value}" for name, value in figures.items())
