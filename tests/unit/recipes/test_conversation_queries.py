"""Conversations as queries, in the forms in which datasets hold them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Json, List
from pyarrow.parquet import write_table

from distill_datasets.conversations import from_text
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from tests.support.conversations import TOOLS, said, talks, user

CALL = {"name": "find_order", "arguments": {"id": "A-1", "deep": {"n": 1}}}
MESSAGES = [
    {"role": "system", "content": "It is Monday."},
    user("Where is my order?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": CALL["name"], "arguments": '{"deep": {"n": 1}, "id": "A-1"}'},
            }
        ],
    },
    {"role": "tool", "content": '{"state": "sent"}', "tool_call_id": "call_1"},
]
PLAIN = {"type": "function", "function": CALL}
SHAREGPT = [
    {"from": "system", "value": "It is Monday."},
    {"from": "human", "value": "Where is my order?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"state": "sent"}'},
]
FORMS: dict[str, Any] = {
    "OpenAI's": MESSAGES,
    "with nulls and other keys": [
        {**one, "name": None, "weight": 1, "tool_calls": one.get("tool_calls")} for one in MESSAGES
    ],
    "ShareGPT's": SHAREGPT,
    "Hermes'": [
        *SHAREGPT[:2],
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
        {"from": "tool", "value": '<tool_response>\n{"state": "sent"}\n</tool_response>'},
    ],
    "without ids": [
        *MESSAGES[:2],
        {"role": "assistant", "content": None, "tool_calls": [PLAIN]},
        {"role": "tool", "content": {"state": "sent"}},
    ],
    "in parts": [
        {**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES
    ],
    "JSON text": json.dumps(MESSAGES),
    "in columns": {
        "role": [one["role"] for one in MESSAGES],
        "content": [one["content"] for one in MESSAGES],
        "tool_calls": [one.get("tool_calls") for one in MESSAGES],
    },
}


def queries(folder: Path) -> list[str]:
    return list(load_queries(load_recipe(folder))["query"])


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_one_text_whatever_its_form(tmp_path: Path, form: str) -> None:
    (text,) = queries(talks(tmp_path / "recipe", [{"messages": FORMS[form]}]))
    assert from_text(text) == MESSAGES


def test_keys_that_parquet_fills_in_are_no_arguments(tmp_path: Path) -> None:
    """Nor are they a message's; a JSON object that is a reference keeps its nulls."""
    import pyarrow as pa

    asked = [
        [user("a"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        for call in (
            {"name": "find", "arguments": {"id": "A"}},
            {"name": "find", "arguments": {"of": {"size": 0.6}}},
        )
    ]
    rows = [{"messages": one, "answer": {"a": None, "b": 1}} for one in asked]
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "prompt.md").write_text("Help.")
    (tmp_path / "recipe.yaml").write_text(
        "name: n\ndescription: d\nteacher: pocket\n"
        "queries: {file: rows.parquet, messages: messages, reference: answer}\n"
    )
    queries = load_queries(load_recipe(tmp_path))
    made = [from_text(one)[1]["tool_calls"][0]["function"]["arguments"] for one in queries["query"]]
    assert made == ['{"id": "A"}', '{"of": {"size": 0.6}}']
    assert queries["reference"] == ['{"a": null, "b": 1}'] * 2


def test_what_datasets_and_parquet_hold_is_read(tmp_path: Path) -> None:
    text = queries(talks(tmp_path / "recipe", [MESSAGES]))
    nested = Dataset.from_list([{"messages": MESSAGES}])
    write_table(nested.data.table, tmp_path / "nested.parquet")
    as_json = Dataset.from_list(
        [{"messages": MESSAGES}], features=Features({"messages": List(Json())})
    )
    as_json.to_parquet(str(tmp_path / "folder" / "data" / "train.parquet"))
    for path in ("nested.parquet", "folder"):
        source = {"path": str(tmp_path / path), "messages": "messages"}
        assert queries(talks(tmp_path / "other", [], queries=source)) == text


def test_a_text_among_conversations_is_a_users_message(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": "[support] Hi"}, {"messages": user("Hi")}, [user("Hi")]]
    first, *others = map(from_text, queries(talks(tmp_path / "recipe", rows)))
    assert first == [user("[support] Hi")]
    assert others == [[user("Hi")]] * 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('[{"role": "user"', "expected messages as JSON, found"),
        ([{"role": "narrator", "content": "Once"}], "expected a role of .* found 'narrator'"),
        ([said("Hello")], "expected a message of a user or a tool at the end"),
        ([user(" ")], "its last message is empty"),
        ([user("\u200b\ufeff ")], "its last message is empty"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text as content"),
        (7, "expected a list of messages, found 7"),
    ],
)
def test_what_is_no_conversation_is_an_error_with_its_row(
    tmp_path: Path, row: Any, says: str
) -> None:
    folder = talks(tmp_path / "recipe", [[user("Hi")], {"messages": row}])
    with pytest.raises(RecipeError, match=f"Query 2: {says}"):
        queries(folder)


def test_an_empty_conversation_is_an_empty_query(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Query 1 is empty"):
        queries(talks(tmp_path / "recipe", [{"messages": None}]))


def test_answers_that_are_there_already_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [[user("Hi"), said("Yes?"), user("Bye"), said("Bye")], [user("Hi")]]
    folder = talks(tmp_path / "recipe", rows)
    with pytest.warns(UserWarning, match="1 messages are left out of 1 of the 2 conversations"):
        first, _ = map(from_text, queries(folder))
    assert first == rows[0][:3]
    talks(folder, rows, turns="all")
    with pytest.warns(UserWarning, match="2 messages .*: every message of an assistant"):
        first, _ = map(from_text, queries(folder))
    assert first == [user("Hi"), user("Bye")]


def test_tools_beside_conversations_that_the_teacher_is_not_given_are_told_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    rows = [{"messages": [user("Hi")], "tools": json.dumps(TOOLS)}]
    queries(talks(tmp_path / "with", rows, tools=True))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the teacher is given none: .* name it as `tools`"):
        queries(talks(tmp_path / "without", rows))


def test_a_tools_message_is_refused_where_every_turn_is_answered(tmp_path: Path) -> None:
    folder = talks(tmp_path / "recipe", [MESSAGES], turns="all", tools=True)
    with pytest.raises(RecipeError, match=r"Query 1: a tool's message answers a call that the"):
        queries(folder)


def test_references_of_calls_are_written_as_answers_are(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("A-1")], "right": [PLAIN]},
        {"messages": [user("A-2")], "right": json.dumps([CALL])},
        {"messages": [user("Hi")], "right": []},
    ]
    source = {"file": "queries.jsonl", "messages": "messages", "reference": "right"}
    folder = talks(tmp_path / "recipe", rows, queries=source, tools=True)
    written = '[{"name": "find_order", "arguments": {"deep": {"n": 1}, "id": "A-1"}}]'
    assert load_queries(load_recipe(folder))["reference"][:] == [written, written, "[]"]
    talks(folder, [{**rows[0], "right": "ask back"}], queries=source, tools=True)
    with pytest.raises(RecipeError, match="Reference 1: expected a list of calls"):
        queries(folder)
    talks(folder, [{**rows[0], "right": {"name": "find_oder"}}], queries=source, tools=True)
    with pytest.raises(RecipeError, match="Reference 1: there is no tool 'find_oder'"):
        queries(folder)


def test_a_tools_message_needs_a_call_before_it(tmp_path: Path) -> None:
    rows = [[user("Hi"), {"role": "tool", "content": "sent"}]]
    with pytest.raises(RecipeError, match="Query 1: expected a call of the assistant before"):
        queries(talks(tmp_path / "recipe", rows))


def test_checks_and_examples_of_tools_that_are_not_there_are_said(tmp_path: Path) -> None:
    checks = [{"name": "looks", "calls": "find_oder"}]
    folder = talks(tmp_path / "recipe", [[user("Hi")]], tools=True, checks=checks)
    with pytest.raises(RecipeError, match="The check 'looks': there is no tool 'find_oder'"):
        queries(folder)
    talks(folder, [[user("Hi")]], tools=True, examples="examples.jsonl")
    for response, says in (
        ('<tool_call>{"name": "find_oder"}</tool_call>', "there is no tool 'find_oder'"),
        ("<tool_call>{</tool_call>", "its calls can't be read"),
    ):
        (folder / "examples.jsonl").write_text(json.dumps({"query": "a", "response": response}))
        with pytest.raises(RecipeError, match=f"row 1: {says}"):
            queries(folder)


def test_a_missing_column_is_named_by_its_own_key(tmp_path: Path) -> None:
    source = {"file": "queries.jsonl", "messages": "message"}
    folder = talks(tmp_path / "recipe", [[user("Hi")]], queries=source)
    with pytest.raises(RecipeError, match=r"queries\.messages.*Did you mean 'messages'"):
        queries(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tools", TOOLS, "tools: expected text"),
        ("student", "[desk]", "student: expected a mapping"),
        ("mix", {"name": "general"}, "mix: expected a list"),
        ("checks", [{"name": "a", "jsn": True}], "Did you mean 'json'.*characters, json, fields"),
        ("keep", ["x"], r"or 'all checks'\.$"),
    ],
)
def test_a_key_of_another_kind_is_said_in_yamls_words(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    folder = talks(tmp_path / "recipe", [[user("Hi")]])
    fields = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**fields, key: value}))
    with pytest.raises(RecipeError, match=says):
        load_recipe(folder)
