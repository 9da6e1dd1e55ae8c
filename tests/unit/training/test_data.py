"""Which rows can be trained on, and what is said of those that can't: no model."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError
from distill_datasets.training.data import DatasetSplit, locate, open_splits
from distill_datasets.training.settings import TrainSettings

ASKED = {"role": "user", "content": "Where is it?"}
SAID = {"role": "assistant", "content": "Here."}
CALL = {"type": "function", "id": "7", "function": {"name": "look", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TEXT_PARTS = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]


def split(file: Path) -> DatasetSplit:
    return open_splits(locate(file), TrainSettings())["train"]


def jsonl(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


READ = {
    "plain": {"messages": [ASKED, SAID]},
    "json text": {"messages": json.dumps([ASKED, SAID])},
    "parts": {"messages": [{**ASKED, "content": TEXT_PARTS}, SAID]},
    "no calls": {"messages": [ASKED, {**SAID, "tool_calls": []}]},
    "null keys": {"messages": [{**ASKED, "name": None}, {**SAID, "tool_calls": None}]},
    "mixed": {"prompt": [ASKED], "completion": "Here."},
    "both": {"messages": [ASKED, SAID], "prompt": "else", "completion": "else"},
}


@pytest.mark.parametrize("case", READ)
def test_what_people_have_is_read_as_a_conversation(case: str, tmp_path: Path) -> None:
    assert list(split(jsonl(tmp_path, READ[case])).conversations) == [[ASKED, SAID]]


REFUSED = {
    "a tool call": {"messages": [ASKED, CALLED]},
    "a tool call before": {"messages": [ASKED, CALLED, {"role": "tool", "content": "3"}, SAID]},
    "null content": {"messages": [{**ASKED, "content": None}, SAID]},
    "a role that is none": {"messages": [{**ASKED, "role": "human"}, SAID]},
    "an image": {"messages": [{**ASKED, "content": [{"type": "image_url", "url": "x"}]}, SAID]},
    "a message that is text": {"messages": ["Where is it?", "Here."]},
    "text that is no JSON": {"messages": "Where is it?"},
    "JSON that is no list": {"messages": '{"role": "user"}'},
    "a null response": {"query": "Where?", "response": None},
    "a number": {"query": "Where?", "response": 7},
    "a list": {"prompt": "Where?", "completion": ["Here."]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_trained_is_one_sentence_with_file_and_row(
    case: str, tmp_path: Path
) -> None:
    file = jsonl(tmp_path, REFUSED[case])
    with pytest.raises(DatasetError, match=r"rows.jsonl', row 0: expected .*; found "):
        list(split(file).conversations)


def test_the_row_is_counted_from_the_first(tmp_path: Path) -> None:
    good = {"messages": [ASKED, SAID]}
    file = jsonl(tmp_path, good, good, {"messages": [ASKED, {**SAID, "content": None}]})
    with pytest.raises(DatasetError, match="row 2: expected messages"):
        list(split(file).conversations)


def csv(folder: Path, text: str | bytes) -> Path:
    file = folder / "rows.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize(
    "code", ["007", "3.10", "NA", "None", "true", "2024-01-05", "123456789012345678901", "1e3", "-"]
)
def test_a_csv_files_fields_are_text_as_written(code: str, tmp_path: Path) -> None:
    for rows in (csv(tmp_path, f"query,response\nWhere?,{code}\n"), tmp_path):
        (conversation,) = split(rows).conversations
        assert conversation[1]["content"] == code


def test_quoted_fields_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    (conversation,) = split(csv(tmp_path, 'query,response\n"a, ""b""\nc",d\n')).conversations
    assert [one["content"] for one in conversation] == ['a, "b"\nc', "d"]


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (conversation,) = split(csv(tmp_path, "\ufeffquery,response\na,b\n")).conversations
    assert conversation[0]["content"] == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,response\na,b\nc,d,e\n", r"line 3: expected 2 fields.*found 3"),
        ("query,response\na,b,c\nd,e,f\n", r"line 2: expected 2 fields.*found 3"),
        ("query,response\na\n", r"line 2: expected 2 fields.*found 1"),
        ('query,response\na,"b\n', "line 2: unexpected end of data"),
        ("query;response\na;b\n", r"found \['query;response'\]"),
        ("query,response\nol\u00e9,b\n".encode("latin-1"), "line 2: expected UTF-8"),
    ],
)
def test_a_broken_csv_file_is_one_sentence(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        split(csv(tmp_path, text))


def test_json_lines_in_another_encoding_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"query": "ol\u00e9", "response": "b"}\n'.encode("latin-1"))
    with pytest.raises(DatasetError, match=r"rows.jsonl', line 1: expected UTF-8; found b'"):
        split(file)


def test_a_column_that_is_read_as_dates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected text in 'response'; found dates"):
        split(jsonl(tmp_path, {"query": "When?", "response": "2024-01-05"}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_manifest_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    jsonl(tmp_path, READ["plain"])
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DatasetError, match="manifest.json' is damaged: expected JSON"):
        locate(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b'{"files": 3}'])
def test_a_manifest_of_somebody_else_is_no_release(content: bytes, tmp_path: Path) -> None:
    file = jsonl(tmp_path, READ["plain"])
    (tmp_path / "manifest.json").write_bytes(content)
    assert locate(tmp_path).path == file.parent
