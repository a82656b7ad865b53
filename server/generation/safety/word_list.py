"""Prompt checker with a list of words. It matches whole words, and its reason names the entry that matched."""

import re
import unicodedata
from pathlib import Path

from server.errors import SettingsError
from server.generation.safety.checker import Verdict

WORD = re.compile(r"\w+")


class WordList:
    """Words and phrases, one a line. `word*` matches all words that begin so; lines with # are comments.

    Matching ignores case, invisible characters and forms that Unicode normalises (NFKC), such as full-width letters.
    It also ignores spaces and punctuation between the words of a phrase.
    """

    def __init__(self, lines: list[str]) -> None:
        self._entries: dict[str, list[tuple[str, ...]]] = {}  # by a whole first word
        self._beginnings: list[tuple[str, ...]] = []  # entries whose first word ends with *
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
        """Reads a file in UTF-8. Raises SettingsError if that fails or the file holds no word."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--safety prompt={path}: cannot be read: {error}") from error
        word_list = cls([line for line in lines if not line.lstrip().startswith("#")])
        if not word_list._entries and not word_list._beginnings:
            raise SettingsError(f"--safety prompt={path}: holds no word; one word or phrase a line")
        return word_list

    def check(self, prompt: str) -> Verdict:
        words = WORD.findall(plain(prompt))
        for start, word in enumerate(words):
            for entry in (*self._entries.get(word, ()), *self._beginnings):
                candidate = words[start : start + len(entry)]
                if len(candidate) == len(entry) and all(map(matches, entry, candidate)):
                    return Verdict(False, f"{' '.join(entry)!r} stands on this server's list of words")
        return Verdict(True)


def matches(pattern: str, word: str) -> bool:
    return word.startswith(pattern[:-1]) if pattern.endswith("*") else word == pattern


def plain(text: str) -> str:
    """Returns the text in the form that is compared."""
    visible = (letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return "".join(visible).casefold()
