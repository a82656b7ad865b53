"""Docstrings state what a thing is or does, and one word stands for an image."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "engines", "bench", "distill")
TOPIC = re.compile(r"(What|How|Where|Whether|Who)\b")
SECOND_WORD = re.compile("picture", re.IGNORECASE)

# Names of a wire format that an identifier must repeat, by file.
_MANIFEST = "pictures"  # a field of manifest.json, which GET /v1/info answers with
ALLOWED: dict[str, str] = {
    "engines/artifacts/manifest.py": _MANIFEST,
    "engines/build/builder.py": _MANIFEST,
    "bench/acceptance/steps.py": _MANIFEST,
    "bench/budget/engine.py": _MANIFEST,
}


def tracked(*folders: str) -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.split("\0") if name.endswith(".py") and (ROOT / name).is_file()]


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each docstring, of a name documented by a string beside it included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    yield statement.lineno, text


def words(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each identifier, comment and docstring line; no other strings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.COMMENT):
            yield token.start[0], token.string
    for first, text in docstrings(source):
        yield from enumerate(text.splitlines(), first)


def topics(source: str) -> list[tuple[int, str]]:
    return [(line, text) for line, text in docstrings(source) if TOPIC.match(text.lstrip())]


def second_words(source: str, allowed: str = "") -> list[tuple[int, str]]:
    if not SECOND_WORD.search(source):
        return []
    return [(line, text) for line, text in words(source) if SECOND_WORD.search(text) and text != allowed]


def offenders(names: list[str], check: Callable[[str, str], list[tuple[int, str]]]) -> str:
    found = ((name, line, text) for name in names for line, text in check(name, (ROOT / name).read_text()))
    return "\n".join(f"{name}:{line}: {text.strip().splitlines()[0][:80]}" for name, line, text in found)


def test_no_docstring_begins_with_a_question_word() -> None:
    if found := offenders(tracked(), lambda _, source: topics(source)):
        pytest.fail(found, pytrace=False)


@pytest.mark.parametrize("room", ROOMS)
def test_one_word_stands_for_an_image(room: str) -> None:
    """Wire strings are string literals, which are not looked at. ALLOWED lists identifiers that repeat them."""
    if found := offenders(tracked(room), lambda name, source: second_words(source, ALLOWED.get(name, ""))):
        pytest.fail(found, pytrace=False)


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_file_still_needs_its_permission(name: str) -> None:
    word = ALLOWED[name]
    assert word in {text for _, text in words((ROOT / name).read_text())}, f"{name} lacks {word}: take it from ALLOWED"


def test_the_checks_find_what_they_look_for() -> None:
    assert topics('def f():\n    """What f returns."""\n') == [(2, "What f returns.")]
    assert not topics('def f():\n    """Returns what g returns."""\n')
    found = second_words('made_pictures = {"type": "picture"}  # of a Picture\npictures = 1\n', allowed="pictures")
    assert found == [(1, "made_pictures"), (1, "# of a Picture")]
    assert second_words('def f():\n    """Returns\n\n    a picture.\n    """\n') == [(4, "    a picture.")]
