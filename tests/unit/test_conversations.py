"""Conversations and calls of tools as text, and back."""

import json
from typing import Any

import pytest

from distill_datasets.conversations import (
    Call,
    assistant_message,
    calls_text,
    from_text,
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
    ],
)
def test_what_is_no_conversation_is_said(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_messages(given)
