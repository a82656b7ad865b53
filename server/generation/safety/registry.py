"""Makes the checkers that --safety names: word lists, our own checkers, and entry points of other packages.

An entry point is a function or class that takes the text after `NAME:` in --safety and returns a checker. It is called
once, when the server starts.
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


def prompt_checker(option: str) -> PromptChecker:
    """Returns a word list if `option` is a file, else the checker NAME[:ARGUMENT]. Raises SettingsError."""
    if Path(option).is_file():
        return WordList.read(Path(option))
    checker: PromptChecker = _checker("prompt", option, PROMPT_GROUP, {}, "a file of words, ")
    return checker


def image_checker(option: str) -> ImageChecker:
    """Returns the checker NAME[:ARGUMENT]. Raises SettingsError."""
    checker: ImageChecker = _checker("image", option, IMAGE_GROUP, OWN_IMAGE_CHECKERS, "")
    return checker


def _checker(what: str, option: str, group: str, own: dict[str, Callable[[str], Any]], also: str) -> Any:
    name, _, argument = option.partition(":")
    if name in own:
        return own[name](argument)
    installed = entry_points(group=group)
    matching = [entry for entry in installed if entry.name == name]
    if len(matching) != 1:
        known = ", ".join(sorted({*own, *installed.names})) or "none is installed"
        raise SettingsError(
            f"--safety {what}={option}: {len(matching)} checkers have this name, allowed: {also}"
            f"or a name under the entry point group {group} ({known})"
        )
    try:
        return matching[0].load()(argument)
    except Exception as error:  # whatever another package raises
        raise SettingsError(f"--safety {what}={option}: the checker cannot be made: {error!r}") from error
