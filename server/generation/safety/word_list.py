"""Prompts held against a list of words, which refuses nothing by surprise: whole words, and what matched is told."""

import re
import unicodedata
from pathlib import Path

from server.errors import SettingsError
from server.generation.safety.checker import Verdict

WORD = re.compile(r"\w+")


class WordList:
    """Words and phrases, one a line; `word*` stands for all words that begin so; lines with # do not count.

    Upper and lower case are the same, and so are forms that Unicode takes for equal (NFKC, which full-width letters
    are brought to, and no invisible characters). Between the words of a phrase may be any spaces and punctuation.
    """

    def __init__(self, lines: list[str]) -> None:
        self._entries: dict[str, list[tuple[str, ...]]] = {}  # by the first word, where it is whole
        self._beginnings: list[tuple[str, ...]] = []  # entries whose first word is the beginning of one
        for line in lines:
            entry = tuple(re.findall(r"\w+\*?", plain(line)))
            if not entry:
                continue
            if entry[0].endswith("*"):
                self._beginnings.append(entry)
            else:
                self._entries.setdefault(entry[0], []).append(entry)

    @classmethod
    def read(cls, path: Path) -> "WordList":
        """Raises SettingsError where the file cannot be read or holds no word."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--safety prompt={path}: cannot be read: {error}") from error
        found = cls([line for line in lines if not line.lstrip().startswith("#")])
        if not found._entries and not found._beginnings:
            raise SettingsError(f"--safety prompt={path}: holds no word; one word or phrase a line")
        return found

    def check(self, prompt: str) -> Verdict:
        words = WORD.findall(plain(prompt))
        for place, word in enumerate(words):
            for entry in (*self._entries.get(word, ()), *self._beginnings):
                there = words[place : place + len(entry)]
                if len(there) == len(entry) and all(map(matches, entry, there)):
                    return Verdict(False, f"{' '.join(entry)!r} stands on this server's list of words")
        return Verdict(True)


def matches(pattern: str, word: str) -> bool:
    return word.startswith(pattern[:-1]) if pattern.endswith("*") else word == pattern


def plain(text: str) -> str:
    """The text as it is compared."""
    seen = (letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return "".join(seen).casefold()
