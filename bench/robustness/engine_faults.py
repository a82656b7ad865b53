"""Faults of the engine, requested by prompts that engines.fake.FaultInjection knows; and faults of checks."""

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.robustness.fault import Fault, Seen
from bench.robustness.scenario import RIGHT, Stage

TOGETHER = 4
FAILED = frozenset({"500 engine_failed"})
REFUSED, UNCHECKED = frozenset({"422 content_policy_violation"}), frozenset({"503 safety_check_failed"})
REFUSED_WORD, REFUSED_SIDE, UNCHECKED_SIDE = "forbidden", 96, 128
# A package of one checker, which goes by the width of an image, as pip would install it.
CHECKER = {
    "sized_checker.py": f"""
from server.generation.safety.checker import Verdict

class Sized:
    def __init__(self, argument):
        pass

    def check(self, pixels):
        if pixels.shape[1] == {UNCHECKED_SIDE}:
            raise RuntimeError("no verdict")
        return Verdict(pixels.shape[1] != {REFUSED_SIDE}, "its width")
""",
    "sized_checker-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sized-checker\nVersion: 1.0\n",
    "sized_checker-1.0.dist-info/entry_points.txt": "[sana_sprint.safety.image]\nsized = sized_checker:Sized\n",
    "words": REFUSED_WORD,
}
DYING = frozenset({RIGHT, "500 engine_failed", "503 engine_hung", "503 engine_lost", "503 not_ready", "refused", "cut"})
EXIT_HANG, EXIT_ENGINE = 70, 71  # docs/operate/operations.md


def install_checkers(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Flags and environment of a server that checks prompts and images."""
    for name, text in CHECKER.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return ("--safety", f"prompt={folder / 'words'},image=sized"), {"PYTHONPATH": str(folder)}


def prompts(marker: str, size: int = 64) -> Callable[[Stage], Awaitable[Seen]]:
    """Orders with `marker`, a few at a time among those of bystanders."""

    async def play(stage: Stage) -> Seen:
        seen: Seen = Counter()
        for first in range(0, stage.count, TOGETHER):
            jobs = [stage.order(marker, size) for _ in range(min(TOGETHER, stage.count - first))]
            stage.strike()
            seen += await stage.together(jobs)
            await stage.recover()
        return seen

    return play


def loses_engine(marker: str, exit_code: int, orders: int) -> Callable[[Stage], Awaitable[Seen]]:
    """Orders with `marker` until the process leaves; its exit code counts as seen."""

    async def play(stage: Stage) -> Seen:
        seen: Seen = Counter()
        for _ in range(stage.count):
            exits = len(stage.supervisor.codes)
            stage.strike()
            for _ in range(orders):
                seen[await stage.ask(stage.order(marker))] += 1
            code = await stage.supervisor.wait_exit(exits + 1)
            if code != exit_code:
                seen[f"exit code {code}, not {exit_code}"] += 1
            await stage.recover()
        return seen

    return play


FAULTS = (
    Fault("engine exception that passes", 200, prompts("[[once]]")),
    Fault("poisonous job", 200, prompts("[[raise]]"), hit=FAILED),
    Fault("out of memory in a batch", 200, prompts("[[memory]]", 96)),
    Fault("NaN", 200, prompts("[[nan]]"), hit=FAILED),
    Fault("all-black output", 200, prompts("[[black]]"), hit=FAILED),
    Fault("hang (exit code 70)", 5, loses_engine("[[hang]]", EXIT_HANG, 1), hit=FAILED, bystanders=DYING),
    Fault("refused prompt", 200, prompts(REFUSED_WORD), hit=REFUSED, stage="safety"),
    Fault("refused image", 200, prompts("", REFUSED_SIDE), hit=REFUSED, stage="safety"),
    Fault("checker that fails", 200, prompts("", UNCHECKED_SIDE), hit=UNCHECKED, stage="safety"),
    # Three jobs that fail alone make the engine prove itself; a fourth may come before or after it could not.
    Fault("engine lost (exit code 71)", 5, loses_engine("[[break]]", EXIT_ENGINE, 3), hit=DYING, bystanders=DYING),
)
