"""From the words of --safety to checkers: files of words, names of ours, and entry points of other packages.

An entry point is a function (or a class) of one text, what follows the name and a colon in --safety, that returns a
checker. It is called once, when the server starts.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from server.errors import SettingsError
from server.generation.safety.checker import ImageChecker, PromptChecker
from server.generation.safety.open_nsfw import OpenNsfw
from server.generation.safety.word_list import WordList

PROMPT_GROUP = "sana_sprint.safety.prompt"
IMAGE_GROUP = "sana_sprint.safety.image"
OWN_IMAGE_CHECKERS: dict[str, Callable[[str], ImageChecker]] = {"opennsfw": OpenNsfw}


def prompt_checker(told: str) -> PromptChecker:
    """A word list, where `told` is a file; otherwise NAME[:ARGUMENT]. Raises SettingsError."""
    if Path(told).is_file():
        return WordList.read(Path(told))
    checker: PromptChecker = _made("prompt", told, PROMPT_GROUP, {}, "a file of words, ")
    return checker


def image_checker(told: str) -> ImageChecker:
    """NAME[:ARGUMENT]. Raises SettingsError."""
    checker: ImageChecker = _made("image", told, IMAGE_GROUP, OWN_IMAGE_CHECKERS, "")
    return checker


def _made(what: str, told: str, group: str, own: dict[str, Callable[[str], Any]], also: str) -> Any:
    name, _, argument = told.partition(":")
    if name in own:
        return own[name](argument)
    found = entry_points(group=group)
    wanted = [entry for entry in found if entry.name == name]
    if len(wanted) != 1:
        known = ", ".join(sorted({*own, *found.names})) or "none is installed"
        raise SettingsError(
            f"--safety {what}={told}: {len(wanted)} checkers have this name, allowed: {also}"
            f"or a name under the entry point group {group} ({known})"
        )
    try:
        return wanted[0].load()(argument)
    except Exception as error:  # whatever another package raises
        raise SettingsError(f"--safety {what}={told}: the checker cannot be made: {error!r}") from error
