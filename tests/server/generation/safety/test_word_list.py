"""Prompts that a word list refuses, and its reasons."""

from pathlib import Path

import pytest

from server.errors import SettingsError
from server.generation.safety.word_list import WordList

LIST = ["gore", "Blue Waffle", "nud*", "# harmless", "straße", ""]


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("gore", "gore"),
        ("a lot of GORE, please", "gore"),
        ("a blue\n waffle.", "blue waffle"),
        ("nudes on a beach", "nud*"),
        ("ｇｏｒｅ", "gore"),  # full width
        ("go\u200bre", "gore"),  # a space of no width
        ("die STRASSE", "strasse"),
        ("blue blue waffle", "blue waffle"),
    ],
)
def test_words_of_the_list_are_refused(prompt: str, entry: str) -> None:
    verdict = WordList([line for line in LIST if not line.startswith("#")]).check(prompt)
    assert not verdict.allowed
    assert verdict.reason == f"{entry!r} stands on this server's list of words"


@pytest.mark.parametrize("prompt", ["a gorge", "category", "blue and a waffle", "denude", "a waffle blue", "", "!!"])
def test_parts_of_words_are_not(prompt: str) -> None:
    assert WordList(LIST).check(prompt).allowed


def test_a_file_has_comments_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_text("\ufeff# harmless\n\n  gore  \n", encoding="utf-8")
    words = WordList.read(file)
    assert words.check("a harmless image").allowed
    assert not words.check("gore").allowed


@pytest.mark.parametrize("content", [b"", b"# a\n\n", b"...\n", b"\xff\xfe\xfa"])
def test_a_file_without_words_stops_the_start(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "words"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"--safety prompt=.*(holds no word|cannot be read)"):
        WordList.read(file)
