"""Which rows can be trained on, and what is said of those that can't: no model."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.conversations import Conversation
from distill_datasets.errors import DatasetError
from distill_datasets.training.data import DatasetSplit, locate, open_splits
from distill_datasets.training.settings import TrainSettings

ASKED = {"role": "user", "content": "Where is it?"}
SAID = {"role": "assistant", "content": "Here."}
TEXT_PARTS = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
ARGUMENTS = '{"id": "A-1", "note": null}'
CALL = {"id": "7", "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
CALLED = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "7", "name": "look"},
    SAID,
]
TOOL = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOLS = json.dumps([{"type": "function", "function": TOOL}])


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
    "other keys": {"messages": [{**ASKED, "id": 4}, {**SAID, "weight": 1.0, "lang": "en"}]},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Where is it?"},
            {"from": "gpt", "value": "Here."},
        ]
    },
    "mixed": {"prompt": [ASKED], "completion": "Here."},
    "both": {"messages": [ASKED, SAID], "prompt": "else", "completion": "else"},
}


@pytest.mark.parametrize("case", READ)
def test_what_people_have_is_read_as_a_conversation(case: str, tmp_path: Path) -> None:
    found = list(split(jsonl(tmp_path, READ[case])).conversations)
    assert found == [Conversation([ASKED, SAID])]


def as_object(message: dict[str, Any]) -> dict[str, Any]:
    """With its arguments as an object and no words, as many datasets write a call."""
    if "tool_calls" not in message:
        return message
    call = {**CALL, "function": {"name": "look", "arguments": json.loads(ARGUMENTS)}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize("form", [lambda one: one, as_object])
def test_calls_and_their_results_are_part_of_a_conversation(form: Any, tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"messages": list(map(form, CALLED))})
    assert list(split(rows).conversations) == [Conversation(CALLED)]


def test_keys_that_a_column_of_fixed_keys_fills_in_are_left_out(tmp_path: Path) -> None:
    """In such a table every call has the arguments, and every tool the properties, of all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def called(name: str) -> dict[str, Any]:
        calls = [{"function": {"name": "look", "arguments": {name: "A-1"}}}]
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"messages": [ASKED, answer], "tools": [tool(name)]}

    def tool(name: str) -> dict[str, Any]:
        return {"name": "look", "parameters": {"properties": {name: {"type": "string"}}}}

    table = pa.Table.from_pylist([called("id"), called("city")])
    pq.write_table(table, tmp_path / "rows.parquet")
    read = list(split(tmp_path).conversations)
    made = [one.messages[-1]["tool_calls"][0]["function"]["arguments"] for one in read]
    assert made == ['{"id": "A-1"}', '{"city": "A-1"}']
    given = [json.loads(one.tools or "")[0]["function"] for one in read]
    assert given == [tool("id"), tool("city")]


@pytest.mark.parametrize(
    "given", [TOOLS, json.loads(TOOLS), [TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL]
)
def test_tools_come_as_text_or_as_a_list(given: Any, tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"messages": [ASKED, SAID], "tools": given})
    assert [one.tools for one in split(rows).conversations] == [TOOLS]


@pytest.mark.parametrize("given", [None, "", "[]", []])
def test_a_row_without_tools_has_none(given: Any, tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"messages": [ASKED, SAID], "tools": given})
    assert [one.tools for one in split(rows).conversations] == [None]


REFUSED = {
    "null content": {"messages": [{**ASKED, "content": None}, SAID]},
    "a role that is none": {"messages": [{**ASKED, "role": "narrator"}, SAID]},
    "an image": {"messages": [{**ASKED, "content": [{"type": "image_url", "url": "x"}]}, SAID]},
    "a call of a user": {"messages": [{**ASKED, "tool_calls": [CALL]}, SAID]},
    "a call without a name": {"messages": [ASKED, {**SAID, "tool_calls": [{"id": "7"}]}]},
    "a message that is text": {"messages": ["Where is it?", "Here."]},
    "JSON that is no list": {"messages": '{"role": "user"}'},
    "no messages": {"messages": []},
    "a null response": {"query": "Where?", "response": None},
    "a number": {"query": "Where?", "response": 7},
    "a list": {"prompt": "Where?", "completion": ["Here."]},
    "tools without a name": {"messages": [ASKED, SAID], "tools": [{"look": "up"}]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_trained_is_one_sentence_with_file_and_row(
    case: str, tmp_path: Path
) -> None:
    file = jsonl(tmp_path, REFUSED[case])
    with pytest.raises(DatasetError, match=r"rows.jsonl', row 0: .*: expected .*[,;] found "):
        list(split(file).conversations)


def test_half_a_surrogate_pair_is_named_as_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "Where?", "response": "Here \\ud83d"}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="half of a pair .* write it whole") as refused:
        split(file)
    assert "set of columns" not in str(refused.value)


def test_responses_in_which_nothing_can_be_seen_are_counted(tmp_path: Path) -> None:
    said = [" \n", "\u200b", "Here."]
    rows = [{"query": str(n), "response": one} for n, one in enumerate(said)]
    found = split(jsonl(tmp_path, *rows))
    keys, blank = found.keys_and_blank()
    assert blank == 2 and (keys == found.keys).all()


@pytest.mark.parametrize("text", ['{"role"', '[{"role": ' * 50_000])
def test_text_that_begins_like_json_must_be_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"rows.jsonl', row 0: 'messages': "):
        list(split(jsonl(tmp_path, {"messages": text})).conversations)


def test_the_row_is_counted_from_the_first(tmp_path: Path) -> None:
    good = {"messages": [ASKED, SAID]}
    file = jsonl(tmp_path, good, good, {"messages": [{**ASKED, "content": None}, SAID]})
    with pytest.raises(DatasetError, match="row 2: 'messages': expected text"):
        list(split(file).conversations)


def test_rows_are_known_by_what_they_say_and_their_tools(tmp_path: Path) -> None:
    row = {"messages": [ASKED, SAID]}
    rows = [{**row, "tools": None}, {**row, "tools": TOOLS}, {**row, "tools": "[]"}]
    bare, equipped, empty = split(jsonl(tmp_path, *rows)).keys
    assert bare == empty != equipped
    assert bare == split(jsonl(tmp_path, row)).keys[0] == 6580064235470280240  # as it always was


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
        assert conversation.messages[1]["content"] == code


def test_quoted_fields_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    (conversation,) = split(csv(tmp_path, 'query,response\n"a, ""b""\nc",d\n')).conversations
    assert [one["content"] for one in conversation.messages] == ['a, "b"\nc', "d"]


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (conversation,) = split(csv(tmp_path, "\ufeffquery,response\na,b\n")).conversations
    assert conversation.messages[0]["content"] == "a"


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


def test_numbers_in_a_json_column_are_read_as_they_are_written(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Json, List

    number = 0.6  # of which `datasets` makes 0.6000000000000001
    call = {**CALL, "function": {"name": "look", "arguments": {"size": number, "text": "[1]"}}}
    said = {"role": "assistant", "content": "2", "tool_calls": [call]}
    rows = Dataset.from_dict(
        {"messages": [[json.dumps(one) for one in (ASKED, said)]]},
        features=Features({"messages": List(Json())}),
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    ((_, answer),) = [found.messages for found in split(tmp_path / "rows.parquet").conversations]
    assert answer["content"] == "2"
    arguments = answer["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"size": number, "text": "[1]"}


def test_a_large_validation_split_gives_a_fixed_choice_of_its_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{**ASKED, "content": f"query {row}"}, SAID]} for row in range(40)]
    whole = split(jsonl(tmp_path, *rows))
    chosen = [one.messages[0]["content"] for one in whole.at_most(10).conversations]
    again = [one.messages[0]["content"] for one in whole.at_most(10).conversations]
    assert chosen == again and len({*chosen}) == 10
    assert chosen != [f"query {row}" for row in range(10)]
    assert whole.at_most(40) is whole


def test_a_run_is_no_dataset_and_its_release_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "generation.json").write_text("{}")
    with pytest.raises(DatasetError, match=f"is a run's folder.*{tmp_path / 'release'}"):
        locate(tmp_path)


def test_semicolons_in_a_table_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("query;response\nHallo;Guten Tag, ja\n")
    with pytest.raises(DatasetError, match="in the place of the semicolons"):
        split(file)
