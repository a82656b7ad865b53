"""Engine faults by prompts that the fake engine recognises (engines.fake), and faults of safety checks."""

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.robustness.fault import Fault, Outcomes
from bench.robustness.scenario import OK, Scenario

CONCURRENCY = 4
FAILED = frozenset({"500 engine_failed"})
REFUSED, CHECK_FAILED = frozenset({"422 content_policy_violation"}), frozenset({"503 safety_check_failed"})
REFUSED_WORD, REFUSED_SIDE, CHECK_FAILED_SIDE = "forbidden", 96, 128
# An installed package with one checker, which decides by the width of an image.
CHECKER = {
    "sized_checker.py": f"""
from server.generation.safety.checker import Verdict

class Sized:
    def __init__(self, argument):
        pass

    def check(self, pixels):
        if pixels.shape[1] == {CHECK_FAILED_SIDE}:
            raise RuntimeError("no verdict")
        return Verdict(pixels.shape[1] != {REFUSED_SIDE}, "its width")
""",
    "sized_checker-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sized-checker\nVersion: 1.0\n",
    "sized_checker-1.0.dist-info/entry_points.txt": "[sana_sprint.safety.image]\nsized = sized_checker:Sized\n",
    "words": REFUSED_WORD,
}
ENGINE_LOST = frozenset(
    {OK, "500 engine_failed", "503 engine_hung", "503 engine_lost", "503 not_ready", "refused", "cut"}
)
EXIT_HANG, EXIT_ENGINE = 70, 71  # docs/operate/operations.md


def install_checkers(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Writes the checkers; returns flags and environment of a server that uses them."""
    for name, text in CHECKER.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return ("--safety", f"prompt={folder / 'words'},image=sized"), {"PYTHONPATH": str(folder)}


def marked_requests(marker: str, size: int = 64) -> Callable[[Scenario], Awaitable[Outcomes]]:
    """Sends requests with `marker`, a few at a time among those of background clients."""

    async def run(scenario: Scenario) -> Outcomes:
        outcomes: Outcomes = Counter()
        for first in range(0, scenario.count, CONCURRENCY):
            jobs = [scenario.new_job(marker, size) for _ in range(min(CONCURRENCY, scenario.count - first))]
            scenario.mark_fault()
            outcomes += await scenario.request_all(jobs)
            await scenario.wait_recovery()
        return outcomes

    return run


def engine_exit(marker: str, exit_code: int, requests: int) -> Callable[[Scenario], Awaitable[Outcomes]]:
    """Sends requests with `marker` until the process exits; a wrong exit code counts as an outcome."""

    async def run(scenario: Scenario) -> Outcomes:
        outcomes: Outcomes = Counter()
        for _ in range(scenario.count):
            exits = len(scenario.server.exit_codes)
            scenario.mark_fault()
            for _ in range(requests):
                outcomes[await scenario.ask(scenario.new_job(marker))] += 1
            code = await scenario.server.wait_for_exit(exits + 1)
            if code != exit_code:
                outcomes[f"exit code {code}, not {exit_code}"] += 1
            await scenario.wait_recovery()
        return outcomes

    return run


FAULTS = (
    Fault("engine exception that passes", 200, marked_requests("[[once]]")),
    Fault("poisonous job", 200, marked_requests("[[raise]]"), hit=FAILED),
    Fault("out of memory in a batch", 200, marked_requests("[[memory]]", 96)),
    Fault("NaN", 200, marked_requests("[[nan]]"), hit=FAILED),
    Fault("all-black output", 200, marked_requests("[[black]]"), hit=FAILED),
    Fault("hang (exit code 70)", 5, engine_exit("[[hang]]", EXIT_HANG, 1), hit=FAILED, bystanders=ENGINE_LOST),
    Fault("refused prompt", 200, marked_requests(REFUSED_WORD), hit=REFUSED, server="safety"),
    Fault("refused image", 200, marked_requests("", REFUSED_SIDE), hit=REFUSED, server="safety"),
    Fault("checker that fails", 200, marked_requests("", CHECK_FAILED_SIDE), hit=CHECK_FAILED, server="safety"),
    # After three failed jobs the engine's health is checked; a fourth may come before or after that fails.
    Fault(
        "engine lost (exit code 71)",
        5,
        engine_exit("[[break]]", EXIT_ENGINE, 3),
        hit=ENGINE_LOST,
        bystanders=ENGINE_LOST,
    ),
)
