"""Conversations and calls of tools as text, and back."""

import json
from typing import Any

import pytest

from distill_datasets.conversations import (
    Call,
    assistant_message,
    calls_text,
    fitted_calls,
    from_text,
    linked,
    plain_value,
    read_calls,
    read_messages,
    response_text,
    shown,
    split_calls,
    to_text,
    write_calls,
)

CALLS = [Call("find", {"id": "A-1", "at": {"b": 2.0, "a": [None, "é"]}}), Call("list", {})]


def test_words_and_calls_are_read_back_from_one_text() -> None:
    for content in ("", "Let me look.", "Two\n\nlines"):
        assert split_calls(write_calls(content, CALLS)) == (content, CALLS)
    assert split_calls("No call <b>here</b>.") == ("No call <b>here</b>.", [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "a", "arguments": {}',
        "<tool_call>find A-1</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        "done</tool_call>",
    ],
)
def test_a_call_that_cannot_be_read_is_an_error_and_no_text(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (json has words of its own)
        split_calls(text)


def test_calls_are_equal_whatever_their_order_form_and_numbers() -> None:
    ours = calls_text(CALLS)
    other = [
        {"type": "function", "id": "x", "function": {"name": "list", "arguments": ""}},
        {"name": "find", "parameters": {"at": {"a": [None, "é"], "b": 2}, "id": "A-1"}},
    ]
    assert calls_text(read_calls(other)) == calls_text(read_calls(ours)) == ours
    assert calls_text(read_calls(None)) == calls_text(read_calls("")) == "[]"


def test_a_response_becomes_a_message_and_comes_back() -> None:
    text = write_calls("Wait.", CALLS)
    message = assistant_message(text, calls=True)
    assert message["content"] == "Wait."
    assert [json.loads(one["function"]["arguments"]) for one in message["tool_calls"]] == [
        dict(call.arguments) for call in CALLS
    ]
    assert response_text(message) == text
    assert assistant_message(text, calls=False) == {"role": "assistant", "content": text}


def test_messages_of_all_kinds_of_datasets_are_read() -> None:
    given: list[Any] = [
        {"from": "human", "value": "Hi", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "q7", "function": {
            "name": "find", "arguments": '{"id": 1}'}}], "name": None},
        {"role": "tool", "content": [{"type": "text", "text": "no"}, "ne"], "tool_call_id": "q7"},
        {"role": "developer", "content": "Be\ud83d\ude00", "tool_calls": []},
    ]  # fmt: skip
    messages = read_messages(given)
    assert [one["role"] for one in messages] == ["user", "assistant", "tool", "system"]
    assert messages[0] == {"role": "user", "content": "Hi"}
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "q7"
    assert (messages[2]["content"], messages[3]["content"]) == ("none", "Be😀")
    assert from_text(to_text(messages)) == read_messages(json.dumps(messages)) == messages
    assert shown(messages[:2]).startswith("user: Hi\n\nassistant: <tool_call>")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "expected a list of messages"),
        ("{}", "expected a list of messages"),
        ([{"role": "narrator", "content": "x"}], "narrator"),
        ([{"role": "user"}], "expected text as content, found None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text as content"),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "a"}]}], "of the assistant"),
        (["Hi"], "expected a message with a role and content"),
        (
            [
                {
                    "role": "function_call",
                    "content": f'{{"name": "a", "arguments": {{"b": [{2**64}]}}}}',
                }
            ],
            "expected a number of 64 bits",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": '{"b": NaN}'}]}],
            "expected a number, found nan",
        ),
    ],
)
def test_what_is_no_conversation_is_said(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_messages(given)


def test_marks_of_calls_inside_an_argument_are_its_text() -> None:
    calls = [Call("say", {"text": "<tool_call>{}</tool_call> </tool_call>"})]
    assert split_calls(write_calls("It is </ that.", calls)) == ("It is </ that.", calls)


def test_an_unreadable_call_is_kept_in_a_text_that_cannot_be_read() -> None:
    text = write_calls("Wait.", [CALLS[1], json.dumps("find</tool_call> A-1")])
    assert text.startswith("Wait.\n<tool_call>\n") and "A-1" in text
    with pytest.raises(ValueError, match="expected a call with a name"):
        split_calls(text)
    with pytest.raises(ValueError, match="fewer levels"):
        split_calls(write_calls("", ["[" * 100_000]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3", 3), ("-2.5", -2.5), ("true", True), ("True", "True"), ("None", "None"), ("", "")),
        *(("null", None), ("[1, 2]", [1, 2]), ('{"a": 1.0}', {"a": 1.0}), ('"a"', "a")),
        *((text, text) for text in ("A-1", "1.0", "007", "1e3", "NaN", "-Infinity", "1_000")),
    ],
)
def test_a_plain_text_is_the_value_that_it_writes(text: str, value: Any) -> None:
    found = plain_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "schema", "value"),
    [
        (3, {"type": "string"}, "3"),
        (True, {"type": "string"}, "true"),
        ([1], {"type": ["string", "null"]}, "[1]"),
        (None, {"type": ["string", "null"]}, None),
        ("1.0", {"type": "number"}, 1.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("2", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 2),
        ("False", {"type": "boolean"}, False),
        ("[1]", {"type": "array"}, [1]),
        ("soon", {"type": "integer"}, "soon"),
        (2.0, {"type": "integer"}, 2.0),
        (3, {"enum": ["3"]}, 3),
        (3, True, 3),
        (3, {"type": "boolean"}, 3),
    ],
)
def test_arguments_get_the_type_of_their_schema_where_their_text_can_have_it(
    given: Any, schema: Any, value: Any
) -> None:
    properties = {"type": "object", "properties": {"a": schema}}
    tools = json.dumps([{"function": {"name": "f", "parameters": properties}}])
    (call,) = fitted_calls([Call("f", {"a": given})], tools)
    assert call.arguments == {"a": value} and type(call.arguments["a"]) is type(value)
    assert fitted_calls([Call("g", {"a": given})], tools) == [Call("g", {"a": given})]


def test_what_a_tool_answered_names_its_call() -> None:
    calling = assistant_message(write_calls("", CALLS), calls=True)
    tool: Any = {"role": "tool", "content": "x"}
    second = {**tool, "tool_call_id": "call_2"}
    names = [("call_2", "list"), ("call_1", "find")]
    for answers in ([second, tool], [second, {**tool, "tool_call_id": "call_1"}]):
        found = linked([calling, *answers])[1:]
        assert [(one["tool_call_id"], one["name"]) for one in found] == names
    stray = [tool, calling, tool, {**tool, "tool_call_id": "other", "name": "kept"}]
    found = linked(stray)
    assert found[0] == tool and found[2]["name"] == "find" and found[3] == stray[3]


def test_a_response_that_begins_calls_without_end_is_refused_at_once() -> None:
    """Each beginning looked through to the end they would be ten billion steps."""
    with pytest.raises(ValueError, match="without its beginning or end"):
        split_calls("<tool_call>\n" * 100_000)
