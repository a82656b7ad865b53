"""Reads published prompt sets: MJHQ-30K, GenEval, DPG-Bench, text files, and captions of the tiny world.

Keys and order are those of the file, because evaluators find images by them.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bench.harness.errors import BenchError
from distill.evaluation.scores import evaluation_prompts

Kind = Literal["mjhq", "geneval", "dpg", "text", "tiny"]
KINDS: tuple[str, ...] = get_args(Kind)
PUBLISHED_FILES = {"meta_data.json": "mjhq", "evaluation_metadata.jsonl": "geneval", "dpg_bench.csv": "dpg"}
FLAGS = re.compile(r"--(?:aspect_ratio|ar|hw)")  # removed by NVlabs' prepare_prompt_ar (diffusion/model/utils.py)


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """A prompt. `key` names its images; `metadata` is GenEval's line; `tag` is the category of its score."""

    key: str
    prompt: str
    metadata: Mapping[str, Any] | None = None
    tag: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Entries in the file's order. `sha256` covers keys and prompts, not the file."""

    kind: Kind
    source: str
    entries: tuple[PromptEntry, ...]

    @property
    def sha256(self) -> str:
        lines = (json.dumps([entry.key, entry.prompt]) for entry in self.entries)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_prompt_set(source: str, kind: str | None = None, limit: int | None = None) -> PromptSet:
    """Reads a file, DPG's folder of text files, or tiny:<count>.

    kind: one of KINDS, None: detected from the file name. limit: reads the first `limit` prompts. Raises BenchError for
    other files, and for keys that are repeated or no file names.
    """
    kind = kind or _kind_of(source)
    if kind not in KINDS:
        raise BenchError(f"kind: got {kind!r}, allowed are {', '.join(KINDS)}")
    try:
        entries = READERS[kind](source)
    except OSError as error:
        raise BenchError(f"prompts: cannot read {source}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"prompts: {source} is no prompt set of the kind {kind} ({error!r})") from error
    entries = entries[:limit]
    if not entries:
        raise BenchError(f"prompts: {source} holds none")
    (key, count), *_ = Counter(entry.key for entry in entries).most_common(1)
    if count > 1:
        raise BenchError(f"prompts: {source} has the key {key!r} {count} times; needed is one name for each")
    for entry in entries:
        if not re.fullmatch(r"[\w-][\w .-]*", entry.key):
            raise BenchError(f"prompts: {source} has the key {entry.key!r}, which is no file name")
        if not entry.prompt:
            raise BenchError(f"prompts: {source} has no words under the key {entry.key!r}")
    return PromptSet(kind, source, tuple(entries))  # type: ignore[arg-type]  # one of KINDS


def _kind_of(source: str) -> str:
    path = Path(source)
    if re.fullmatch(r"tiny:\d+", source):
        return "tiny"
    if path.name in PUBLISHED_FILES:
        return PUBLISHED_FILES[path.name]
    if path.is_dir():
        return "dpg"
    if path.suffix == ".txt":
        return "text"
    raise BenchError(f"prompts: {source} tells no kind; name it with --kind {'|'.join(KINDS)}")


def _without_flags(prompt: str) -> str:
    return FLAGS.split(prompt)[0].strip()


def _mjhq(source: str) -> list[PromptEntry]:
    document = json.loads(Path(source).read_text(encoding="utf-8"))
    return [
        PromptEntry(key, _without_flags(value["prompt"]), tag=value.get("category")) for key, value in document.items()
    ]


def _geneval(source: str) -> list[PromptEntry]:
    lines = [json.loads(line) for line in _lines(source)]
    return [
        PromptEntry(f"{index:05}", _without_flags(line["prompt"]), line, line["tag"])
        for index, line in enumerate(lines)
    ]


def _dpg(source: str) -> list[PromptEntry]:
    """Reads DPG-Bench's folder of <id>.txt, its CSV with one row a question, or NVlabs' JSON."""
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        return [PromptEntry(file.stem, _without_flags(file.read_text(encoding="utf-8"))) for file in files]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [
                PromptEntry(key, _without_flags(text))
                for key, text in {row["item_id"]: row["text"] for row in csv.DictReader(file)}.items()
            ]
    document = json.loads(path.read_text(encoding="utf-8"))
    return [PromptEntry(key, _without_flags(value["prompt"])) for key, value in document.items()]


def _text(source: str) -> list[PromptEntry]:
    return [PromptEntry(f"{index:05}", line) for index, line in enumerate(_lines(source))]


def _tiny(source: str) -> list[PromptEntry]:
    prompts = evaluation_prompts(int(source.removeprefix("tiny:")))
    return [PromptEntry(f"{index:05}", prompt.text, tag=prompt.category) for index, prompt in enumerate(prompts)]


def _lines(source: str) -> Sequence[str]:
    return [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]


READERS = {"mjhq": _mjhq, "geneval": _geneval, "dpg": _dpg, "text": _text, "tiny": _tiny}
