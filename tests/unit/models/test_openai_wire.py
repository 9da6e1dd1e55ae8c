"""What an answer says, in all the forms that servers give it."""

import json
import re
from typing import Any

import pytest

from distill_datasets.conversations import Call, split_calls, tool_calls
from distill_datasets.errors import RejectedError, RetryableError, ServiceError
from distill_datasets.models.openai_wire import CallPieces, parse, read_reply, write_body
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling, Usage
from distill_datasets.schema import whole_text

COUNTED = {"prompt_tokens": 5, "completion_tokens": 3}


def completion(content: Any = "yes", reason: Any = "stop", **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "finish_reason": reason, "message": said}
    return {"choices": [choice], "usage": COUNTED}


TOOLS = json.dumps([{"type": "function", "function": {"name": "find", "parameters": {}}}])


def called(content: Any = None, reason: str = "tool_calls", **message: Any) -> str:
    """The text of an answer to a request that has tools."""
    body = completion(content, reason, **message)
    return read_reply(body, Sampling(tools=TOOLS)).samples[0].text


def function(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def sample(content: Any = "yes", reason: Any = "stop", **message: Any) -> Sample:
    (found,) = read_reply(completion(content, reason, **message), Sampling()).samples
    return found


@pytest.mark.parametrize(
    ("reason", "stop_reason"),
    [
        *(
            (reason, "stop")
            for reason in ("stop", "STOP", "eos", "eos_token", "end_turn", "", None)
        ),
        *((reason, "stop") for reason in ("stop_sequence", "COMPLETE", "normal", "odd", 3)),
        *((reason, "length") for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
        *((reason, "length") for reason in ("max_output_tokens", "token-limit", "context length")),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_the_end_of_a_text_is_read_under_any_name(reason: Any, stop_reason: str) -> None:
    assert sample("yes", reason).stop_reason == stop_reason
    assert sample("yes", reason).text == "yes"


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "RECITATION", "sensitive"])
@pytest.mark.parametrize("message", [{"content": "ye"}, {"content": None}, None])
def test_a_filter_is_a_rejection_whatever_is_left_of_the_message(reason: str, message: Any) -> None:
    body = {"choices": [{"message": message, "finish_reason": reason}]}
    with pytest.raises(RejectedError) as raised:
        read_reply(body, Sampling())
    assert raised.value.type == "content policy"


@pytest.mark.parametrize("reason", ["error", "abort", "insufficient_system_resource", "cancelled"])
def test_an_answer_that_a_server_gave_up_is_asked_for_again(reason: str) -> None:
    with pytest.raises(RetryableError, match=reason) as raised:
        sample("half of", reason)
    assert raised.value.most_attempts == 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"label": "x", "text": "é"}, '{"label": "x", "text": "é"}'),
        (3, "3"),
        (True, "true"),
        (["a", "b"], "ab"),
        ([], ""),
        ([{"type": "output_text", "text": "yes"}], "yes"),
        ([{"text": "yes"}], "yes"),
        ([{"type": "text", "text": {"value": "yes"}}], "yes"),
        (
            [{"type": "text", "text": "y"}, {"type": "image_url"}, {"type": "text", "text": "es"}],
            "yes",
        ),
        (["a", {"label": 1}], 'a{"label": 1}'),
    ],
)
def test_a_content_of_any_type_is_a_text(content: Any, text: str) -> None:
    assert sample(content).text == text


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm"},
        {"reasoning": [{"text": "h"}, {"text": "m"}]},
        {"reasoning": {"summary": [{"type": "summary_text", "text": "hm"}]}},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}, {"data": "…"}]},
        {"thinking": "hm"},
    ],
)
def test_reasoning_is_found_under_any_name(message: dict[str, Any]) -> None:
    assert sample("yes", **message) == Sample("yes", "stop", 3, "hm")


def test_reasoning_among_the_parts_of_a_content_is_none_of_its_text() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    assert sample([thinking, {"type": "text", "text": "yes"}]).reasoning == "hm"
    assert sample([thinking, {"type": "text", "text": "yes"}]).text == "yes"


def test_a_refusal_among_the_parts_is_a_rejection() -> None:
    with pytest.raises(RejectedError, match=r"I can't\."):
        sample([{"type": "refusal", "refusal": "I can't."}])
    assert sample("yes", refusal="").text == "yes"


def test_a_choice_may_have_its_text_in_other_places() -> None:
    for place in ({"message": None, "text": "yes"}, {"delta": {"content": "yes"}}):
        body = {"choices": [{**place, "finish_reason": "stop"}]}
        assert read_reply(body, Sampling()).samples[0].text == "yes"


@pytest.mark.parametrize(
    ("usage", "prompt", "response"),
    [
        (None, None, None),
        ({}, None, None),
        ([], None, None),
        ({"prompt_tokens": "5", "completion_tokens": "3"}, 5, 3),
        ({"prompt_tokens": 5.0, "completion_tokens": 3.0}, 5, 3),
        ({"prompt_tokens": 5, "total_tokens": 8}, 5, 3),
        ({"completion_tokens": 3, "total_tokens": 8}, 5, 3),
        ({"prompt_tokens": 5, "completion_tokens": None}, 5, None),
        ({"input_tokens": 5, "output_tokens": 3}, 5, 3),
        ({"prompt_tokens": 5, "completion_tokens": -1}, 5, None),
        ({"prompt_tokens": 5, "completion_tokens": float("nan")}, 5, None),
        ({"prompt_tokens": True, "completion_tokens": "many"}, None, None),
        ({"prompt_tokens": 5, "completion_tokens": 2.5}, 5, None),
    ],
)
def test_counts_are_read_where_they_are_and_else_unknown(
    usage: Any, prompt: int | None, response: int | None
) -> None:
    reply = read_reply({**completion(), "usage": usage}, Sampling())
    assert (reply.usage.prompt_tokens, reply.response_tokens) == (prompt, response)
    assert reply.tokens == (prompt or 0) + (response or 0)
    assert Reply.from_json(reply.to_json()) == reply


def test_unknown_counts_of_several_samples_are_unknown_for_each() -> None:
    body = completion()
    body["choices"] *= 2
    reply = read_reply({**body, "usage": None}, Sampling(n=2))
    assert [one.tokens for one in reply.samples] == [None, None]


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("count", [10**30, "1e30", 2**31])
def test_a_count_that_no_model_reaches_makes_the_answer_malformed(name: str, count: Any) -> None:
    with pytest.raises(RetryableError, match=f"{name} .* more tokens than any") as raised:
        read_reply({**completion(), "usage": {**COUNTED, name: count}}, Sampling())
    assert raised.value.most_attempts == 3


def test_details_of_the_counts_may_have_any_form() -> None:
    usage = {
        **COUNTED,
        "prompt_tokens_details": [{"modality": "TEXT"}],
        "completion_tokens_details": None,
        "prompt_cache_hit_tokens": 2,
        "cost": "0.25",
    }
    assert read_reply({**completion(), "usage": usage}, Sampling()).usage == Usage(5, 2, 0, 0.25)


def test_halves_of_surrogate_pairs_are_joined_or_replaced() -> None:
    assert whole_text("ok \ud83d\ude00 !") == "ok \U0001f600 !"
    assert whole_text("half \ud83d here") == "half \ufffd here"
    assert whole_text("\ude00\ud83d") == "\ufffd\ufffd"
    assert whole_text("a \U0001f600") == "a \U0001f600"


def test_no_text_of_an_answer_keeps_half_a_surrogate_pair() -> None:
    raw = (
        '{"choices": [{"finish_reason": "stop", "message": {"content": "a \\ud83d", '
        '"reasoning": "b \\ude00"}, "logprobs": {"content": [{"token": "\\ud83d", "logprob": -1, '
        '"top_logprobs": []}]}}]}'
    )
    (found,) = read_reply(parse(raw.encode()), Sampling(top_logprobs=0)).samples
    assert (found.text, found.reasoning) == ("a \ufffd", "b \ufffd")
    assert found.logprobs == Logprobs(("\ufffd",), (-1.0,))
    with pytest.raises(RejectedError) as raised:
        sample(None, refusal="no \ud83d")
    assert str(raised.value) == "no \ufffd"


@pytest.mark.parametrize("text", [b"\xff\xfe", b"<html>", b"[]", b"5", b"[" * 100_000, b""])
def test_what_is_no_object_of_json_is_malformed(text: bytes) -> None:
    with pytest.raises(RetryableError) as raised:
        parse(text)
    assert (raised.value.type, raised.value.most_attempts) == ("bad answer", 3)


def test_bytes_that_are_no_utf8_and_a_mark_of_their_order_are_read() -> None:
    assert parse(b'\xef\xbb\xbf{"a": "\xff"}') == {"a": "\ufffd"}


def test_more_or_fewer_samples_than_asked_for_are_the_servers_fault() -> None:
    for n, count in ((2, 1), (1, 2)):
        body = completion()
        body["choices"] *= count
        with pytest.raises(ServiceError, match=f"Asked for {n} samples .* gave {count}"):
            read_reply(body, Sampling(n=n))


def test_an_answer_without_reasoning_or_counts_is_kept_as_briefly_as_ever() -> None:
    kept = json.loads(read_reply(completion(), Sampling()).to_json())
    assert kept == {
        "samples": [{"text": "yes", "stop_reason": "stop", "tokens": 3}],
        "usage": {"prompt_tokens": 5, "cached_tokens": 0},
    }


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [function("find", '{"id": "A"}')]},
        {"tool_calls": [function("find", {"id": "A"})]},
        {"tool_calls": [{"name": "find", "arguments": '{"id": "A"}'}]},
        {"tool_calls": None, "function_call": {"name": "find", "arguments": '{"id": "A"}'}},
    ],
)
@pytest.mark.parametrize("content", [None, "", " I look. "])
def test_calls_are_a_part_of_the_text_in_whatever_form_they_come(
    message: Any, content: str | None
) -> None:
    text = called(content, **message)
    assert split_calls(text) == ((content or "").strip(), [Call("find", {"id": "A"})])


def test_several_calls_are_kept_in_their_order() -> None:
    calls = [function("find", '{"id": 2}'), function("count", ""), function("find", '{"id": 1}')]
    _, found = split_calls(called(tool_calls=calls))
    assert found == [Call("find", {"id": 2}), Call("count", {}), Call("find", {"id": 1})]


@pytest.mark.parametrize(
    "arguments", ['{"id": "A', "[1]", "{}, 1", '{"a": 1}}', "[" * 100_000, "</tool_call>{"]
)
def test_arguments_that_are_no_object_are_kept_as_a_text_that_cannot_be_read(
    arguments: str,
) -> None:
    text = called("Wait.", tool_calls=[function("find", "{}"), function("find", arguments)])
    with pytest.raises(ValueError, match=r"\S"):
        split_calls(text)
    blocks = [json.loads(block) for block in re.findall(r"<tool_call>\n(.*)\n</tool_call>", text)]
    assert blocks[1]["function"]["arguments"] == arguments


def test_marks_of_calls_inside_an_argument_are_its_text() -> None:
    said = "</tool_call><tool_call>{}"
    text = called(tool_calls=[function("find", json.dumps({"id": said}))])
    assert split_calls(text)[1] == [Call("find", {"id": said})]


def test_half_a_surrogate_pair_in_an_argument_can_be_stored() -> None:
    text = called(tool_calls=[function("find", '{"id": "\\ud83d"}')])
    assert text.encode() and "\ufffd" in text


def test_reasoning_beside_calls_is_told_apart() -> None:
    body = completion("<think>hm</think>", "tool_calls", tool_calls=[function("find", "{}")])
    (found,) = read_reply(body, Sampling(tools=TOOLS)).samples
    assert (found.reasoning, split_calls(found.text)) == ("hm", ("", [Call("find", {})]))


@pytest.mark.parametrize("reason", ["stop", "tool_calls"])
def test_a_call_that_nobody_offered_is_a_rejection(reason: str) -> None:
    with pytest.raises(RejectedError, match="called a tool in place of an answer"):
        sample(None, reason, tool_calls=[function("find", "{}")])
    assert sample("yes", reason, tool_calls=[function("find", "{}")]).text == "yes"


def test_a_request_has_the_tools_and_earlier_calls_in_the_protocols_form() -> None:
    calls = tool_calls([Call("find", {"id": "A"})])
    messages: Any = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "there"},
    ]
    body = json.loads(write_body("m", messages, Sampling(tools=TOOLS)))
    assert body["tools"] == json.loads(TOOLS)
    assert body["messages"][1] == {"role": "assistant", "content": None, "tool_calls": calls}
    answer = {"role": "tool", "content": "there", "tool_call_id": "call_1"}
    assert body["messages"][2] == answer
    assert "tools" not in json.loads(write_body("m", messages, Sampling()))


def stream(*deltas: Any) -> str:
    """The text of a message that came in these pieces."""
    pieces = CallPieces()
    assert all([pieces.add(delta) for delta in deltas])
    return called(tool_calls=pieces.joined)


def piece(arguments: Any = "", **fields: Any) -> dict[str, Any]:
    said = {"name": fields.pop("name")} if "name" in fields else {}
    return {"tool_calls": [{**fields, "function": {**said, "arguments": arguments}}]}


TWO = [Call("find", {"id": 1}), Call("count", {"id": 2})]


@pytest.mark.parametrize(
    "deltas",
    [
        # side by side, by index
        (
            piece(index=0, id="a", name="find"),
            piece(index=1, id="b", name="count"),
            piece('{"id"', index=0),
            piece('{"id": 2}', index=1),
            piece(": 1}", index=0),
        ),
        # the name and the id in every piece
        (
            piece('{"id"', index=0, id="a", name="find"),
            piece(": 1}", index=0, id="a", name="find"),
            piece('{"id": 2}', index=1, id="b", name="count"),
        ),
        # whole, without an index or all with one
        (piece('{"id": 1}', id="a", name="find"), piece('{"id": 2}', id="b", name="count")),
        (piece('{"id": 1}', name="find"), piece({"id": 2}, name="count")),
        (
            piece('{"id": 1}', index=0, id="a", name="find"),
            piece('{"id": 2}', index=0, id="b", name="count"),
        ),
    ],
)
def test_streamed_calls_are_joined_however_a_server_cuts_them(deltas: Any) -> None:
    assert split_calls(stream(*deltas))[1] == TWO


def test_a_streamed_call_of_the_older_form_is_joined() -> None:
    said = [{"function_call": {"name": "find"}}, {"function_call": {"arguments": '{"id"'}}]
    assert split_calls(stream(*said, {"function_call": {"arguments": ": 1}"}}))[1] == TWO[:1]
