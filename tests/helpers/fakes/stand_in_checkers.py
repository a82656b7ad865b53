"""A package of checkers that flag prompts and images of a test, and its installation."""

import hashlib
from pathlib import Path

from engines.types import Pixels
from server.generation.safety.checker import Verdict

ENTRY_POINTS = """
[sana_sprint.safety.prompt]
marked = stand_in_checkers:MarkedPrompts
broken = stand_in_checkers:Broken
unmade = stand_in_checkers:unmade
[sana_sprint.safety.image]
listed = stand_in_checkers:ListedImages
broken = stand_in_checkers:Broken
wordless = stand_in_checkers:Wordless
"""


def install(folder: Path) -> None:
    """Writes a package's metadata into `folder`, as pip does; the folder must be on sys.path."""
    about = folder / "stand_in_checkers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in-checkers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)


class MarkedPrompts:
    """Refuses prompts that contain `argument`."""

    def __init__(self, argument: str) -> None:
        self._mark = argument

    def check(self, prompt: str) -> Verdict:
        return Verdict(self._mark not in prompt, "it is marked")


class ListedImages:
    """Refuses images whose digests are in the file `argument`."""

    def __init__(self, argument: str) -> None:
        self._digests = set(Path(argument).read_text().split())

    def check(self, pixels: Pixels) -> Verdict:
        return Verdict(digest(pixels) not in self._digests, "it is listed")


class Broken:
    def __init__(self, argument: str) -> None:
        self._argument = argument

    def check(self, item: object) -> Verdict:
        raise OSError(f"no model in {self._argument}, asked for {item}")


class Wordless:
    """Returns a bool instead of a verdict."""

    def __init__(self, _: str) -> None:
        pass

    def check(self, _: object) -> bool:
        return True


def unmade(argument: str) -> Broken:
    raise ValueError(f"{argument} is no threshold")


def digest(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
