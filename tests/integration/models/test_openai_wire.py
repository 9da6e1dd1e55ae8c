"""Streamed answers, in all the forms that servers give them."""

import json
from typing import Any

import pytest

from distill_datasets.errors import (
    RejectedError,
    RequestError,
    RetryableError,
)
from distill_datasets.models.endpoint import MOST_BYTES
from tests.support.openai_server import Answer, Fault, OpenAIServer, ask


def test_a_stream_that_breaks_off_is_no_answer(server: OpenAIServer) -> None:
    server.answer = Answer(done=False)
    with pytest.raises(RetryableError) as raised:
        ask(server, stream=True)
    assert raised.value.type == "bad answer"


def test_a_stream_that_ends_before_its_token_counts_is_no_answer(server: OpenAIServer) -> None:
    part = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
    server.faults.append(Fault("one", body=f"data: {json.dumps(part)}\n\n"))
    with pytest.raises(RetryableError, match="broke off"):
        ask(server, stream=True)


def test_an_error_in_mid_stream_is_one(server: OpenAIServer) -> None:
    lines = 'data: {"choices": []}\n\ndata: {"error": {"message": "too long", "code": 400}}\n\n'
    server.faults.append(Fault("one", body=lines))
    with pytest.raises(RejectedError, match="too long"):
        ask(server, stream=True)


def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
    part = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [part], **more})}\n\n".encode()


COUNTS = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'


END = [event({}, "stop"), COUNTS, b"data: [DONE]\n\n"]


EMOJI = "ok \U0001f600 !"


STREAMS = {
    "pair over two events": [event({"content": "ok \ud83d"}), event({"content": "\ude00 !"}), *END],
    "character over two pieces": [
        'data: {"choices": [{"delta": {"content": "ok \U0001f600'.encode()[:-2],
        "\U0001f600".encode()[-2:] + b' !"}}]}\n\n',
        *END,
    ],
    "list of parts": [event({"content": [{"type": "text", "text": EMOJI}]}), *END],
    "no delta": [b'data: {"choices": [{"delta": null}]}\n\n', event({"content": EMOJI}), *END],
    "counts in every event": [event({"content": EMOJI}, usage={"prompt_tokens": 5}), *END],
    "no end": [event({"content": EMOJI}), *END[:2]],
    "carriage returns": [b"".join([event({"content": EMOJI}), *END]).replace(b"\n", b"\r")],
    "both ends of a line": [b"".join([event({"content": EMOJI}), *END]).replace(b"\n", b"\r\n")],
    "mark of byte order": [b"\xef\xbb\xbf" + event({"content": EMOJI}), *END],
    "lines of one event": [event({"content": EMOJI}).replace(b", ", b",\ndata: "), *END],
    "comments": [b": wait\n\n", b"event: x\n", event({"content": EMOJI}), *END],
    "no blank lines": [b"".join([event({"content": EMOJI}), *END]).replace(b"\n\n", b"\n")],
}


@pytest.mark.parametrize("pieces", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_read_in_any_form(pieces: list[bytes], server: OpenAIServer) -> None:
    server.faults.append(Fault("one", pieces=pieces))
    (sample,) = ask(server, stream=True).samples
    assert (sample.text, sample.stop_reason, sample.tokens) == (EMOJI, "stop", 3)


def test_half_a_surrogate_pair_at_the_end_of_a_stream_is_replaced(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", pieces=[event({"content": "ok \ud83d"}), *END]))
    assert ask(server, stream=True).samples[0].text == "ok \ufffd"


def test_a_stream_without_counts_has_unknown_ones(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", pieces=[event({"content": "yes"}), END[0], END[2]]))
    reply = ask(server, stream=True)
    assert (reply.samples[0].text, reply.response_tokens) == ("yes", None)


@pytest.mark.parametrize(
    "pieces",
    [
        [event({"content": "ye"}, usage={"prompt_tokens": 5, "completion_tokens": 1})],
        [b"data: {\n\n", *END],
        [b"data: 5\n\n", *END],
        [b'data: {"choices": [5]}\n\n', *END],
        [b": nothing\n\n"],
        [b'data: {"choi'],
    ],
)
def test_a_stream_that_is_none_may_be_asked_for_again(
    pieces: list[bytes], server: OpenAIServer
) -> None:
    server.faults.append(Fault("one", pieces=pieces))
    with pytest.raises(RetryableError) as raised:
        ask(server, stream=True)
    assert (raised.value.type, raised.value.most_attempts) == ("bad answer", 3)


def test_a_server_that_does_not_stream_is_read_whole(server: OpenAIServer) -> None:
    body = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
    headers = {"Content-Type": "application/json"}
    server.faults.append(Fault("one", body=json.dumps(body), headers=headers))
    assert ask(server, stream=True).samples[0].text == "yes"


def test_a_stream_that_is_too_large_is_its_rows_failure(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", pieces=[b"data: " + b"x" * (MOST_BYTES + 10)]))
    with pytest.raises(RequestError, match="at most 16 MiB"):
        ask(server, stream=True)
