"""Files, links, targets, programs and flags in the documentation exist."""

import re
from pathlib import Path

import pytest

from server.cluster import __main__ as cluster
from server.settings import REQUEST_BUCKETS, STAGE_BUCKETS, parser
from server.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("server", "engines", "distill", "bench", "deploy", "tests", "docs", "models")
FILES = [path for path in ROOT.iterdir() if path.is_file()]
FILES += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
NAMES = sorted(str(path.relative_to(ROOT)) for path in FILES)
DOCUMENTS = [name for name in NAMES if name.endswith(".md")]
IN_FOLDER = rf"(?:{'|'.join(FOLDERS)})"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in LINK.findall(text_of(document)):
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document} links to {link}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_code_marks_exist(document: str) -> None:
    marks = re.findall(rf"`({IN_FOLDER}/[^`\s]*)`", text_of(document))
    assert [mark for mark in marks if "<" not in mark and not list(ROOT.glob(mark))] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = re.findall(r"(?:^ {4}|`|\$ )make ([a-z-]+)", text_of(document), re.MULTILINE)
    assert set(named) - targets == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_programs_exist(document: str) -> None:
    modules = re.findall(rf"\bpython3? -m ({IN_FOLDER}[\w.]*)", text_of(document))
    for module in set(modules):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{document}: python -m {module}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_of_the_server_exist(document: str) -> None:
    actions = [*parser()._actions, *cluster.parser()._actions]
    flags = {option for action in actions for option in action.option_strings}
    lines = re.findall(r"python3? -m server\b[^`\n]*", text_of(document))
    named = {flag for line in lines for flag in re.findall(r"--[a-z][\w-]*", line)}
    if document == "docs/operate/operations.md":
        named |= set(re.findall(r"`(--[a-z][\w-]*)", text_of(document)))
    assert named - flags == set()


def test_documented_metrics_are_the_published_ones() -> None:
    metrics = Metrics(request_buckets=REQUEST_BUCKETS, stage_buckets=STAGE_BUCKETS)
    metrics.watch_memory(dict)
    families = re.findall(r"^# TYPE (sana_sprint_\w+) (\w+)", metrics.exposition().decode(), re.MULTILINE)
    published = {name for name, kind in families if not name.endswith("_created")} | {"sana_sprint_engine_info"}
    rows = [line for line in text_of("docs/operate/operations.md").splitlines() if line.startswith("| `sana_sprint_")]
    documented = {name for row in rows for name in re.findall(r"`(sana_sprint_\w+)`", row.split("|")[1])}
    assert documented == published


def test_every_decision_is_numbered_once() -> None:
    numbers = [name.rsplit("/", 1)[1][:4] for name in NAMES if name.startswith("docs/understand/decisions/0")]
    assert len(numbers) == len(set(numbers))


def test_nothing_names_a_machine() -> None:
    private = re.compile(r"(?<![\w.$}])/(?:root|home|work)/\w")
    texts = [name for name in NAMES if name.endswith((".md", ".py", ".toml", ".yml", ".yaml", ".lock", "Makefile"))]
    assert [name for name in texts if private.search(text_of(name))] == []
