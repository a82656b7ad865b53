"""Prompt sets in their published form, and files that are no prompt sets."""

import json
from pathlib import Path

import pytest

from bench.harness.errors import BenchError
from bench.quality.images.prompt_sets import read_prompt_set

LINE = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_mjhq_by_its_own_name(tmp_path: Path) -> None:
    text = json.dumps({"ab12": {"prompt": "a tree --ar 3:2", "category": "landscape"}, "cd34": {"prompt": " a cat "}})
    result = read_prompt_set(write(tmp_path / "meta_data.json", text))
    assert (result.kind, [(entry.key, entry.prompt, entry.tag) for entry in result.entries]) == (
        "mjhq",
        [("ab12", "a tree", "landscape"), ("cd34", "a cat", None)],
    )


def test_geneval_keeps_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "evaluation_metadata.jsonl", f"{json.dumps(LINE)}\n{json.dumps(LINE)}\n")
    result = read_prompt_set(path)
    assert [(entry.key, entry.tag, entry.metadata) for entry in result.entries] == [
        ("00000", "counting", LINE),
        ("00001", "counting", LINE),
    ]


def test_dpg_as_folder_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts" / "partiprompts0.txt", "a dog\n")
    write(tmp_path / "prompts" / "coco1.txt", "a cat, sitting")
    expected = {"coco1": "a cat, sitting", "partiprompts0": "a dog"}
    table = 'item_id,text,proposition_id\ncoco1,"a cat, sitting",1\ncoco1,"a cat, sitting",2\npartiprompts0,a dog,1\n'
    text = json.dumps({key: {"prompt": prompt} for key, prompt in expected.items()})
    for source, kind in [
        (str(tmp_path / "prompts"), None),
        (write(tmp_path / "dpg_bench.csv", table), None),
        (write(tmp_path / "metadata.json", text), "dpg"),
    ]:
        result = read_prompt_set(source, kind)
        assert (result.kind, {entry.key: entry.prompt for entry in result.entries}) == ("dpg", expected)


def test_text_tiny_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.txt", "a red circle\n\na cat\n")
    assert [entry.key for entry in read_prompt_set(path).entries] == ["00000", "00001"]
    assert [entry.prompt for entry in read_prompt_set(path, limit=1).entries] == ["a red circle"]
    tiny = read_prompt_set("tiny:8")
    assert len({entry.tag for entry in tiny.entries}) == 6
    assert tiny.sha256 != read_prompt_set("tiny:7").sha256


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("a.json", "{}", None, "name it with --kind"),
        ("a.json", "{}", "mjhq", "holds none"),
        ("a.json", "[1]", "mjhq", "no prompt set of the kind mjhq"),
        ("a.json", '{"../up": {"prompt": "a"}}', "mjhq", "'../up', which is no file name"),
        ("a.json", '{"a": {"prompt": "--ar 1:1"}}', "mjhq", "no words"),
        ("a.jsonl", '{"prompt": "a"}', "geneval", "no prompt set of the kind geneval"),
        ("a.csv", "item_id\n1\n", "dpg", "no prompt set"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, kind: str | None, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_prompt_set(write(tmp_path / name, text), kind)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot read .*meta_data\.json: No such file"):
        read_prompt_set(str(tmp_path / "meta_data.json"))
