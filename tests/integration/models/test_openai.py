import asyncio
import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.endpoint import MOST_BYTES
from distill_datasets.models.openai.client import OpenAISampler
from distill_datasets.models.openai.errors import read_allowance, read_retry_after
from distill_datasets.models.references import open_sampler
from distill_datasets.models.sampler import Allowance, Logprobs, Reply, Sampler, Sampling, Usage
from distill_datasets.schema import Message
from tests.support.openai_server import Answer, Fault, OpenAIServer, serving

ASKED: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ""}]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving() as started:
        yield started


def ask(
    server: OpenAIServer,
    query: str = "one two three",
    *,
    model: str = "echo-small",
    stream: bool = False,
    timeout: float = 20,
    **sampling: Any,
) -> Reply:
    sampler = OpenAISampler(model, base_url=server.url, stream=stream, timeout=timeout)
    messages: list[Message] = [ASKED[0], {"role": "user", "content": query}]
    return asyncio.run(sampler.sample(messages, Sampling(**sampling)))


def test_a_request_says_all_of_the_sampling_and_nothing_else(server: OpenAIServer) -> None:
    ask(server)
    ask(
        server,
        "zwei ü",
        temperature=0.5,
        max_tokens=7,
        top_p=0.9,
        top_k=5,
        seed=3,
        stop=("\n", "END"),
        n=2,
        top_logprobs=1,
        json_schema='{"type": "object"}',
        extra='{"reasoning_effort": "low", "top_p": null}',
    )
    plain, full = server.bodies
    turns = [ASKED[0], {"role": "user", "content": "one two three"}]
    assert plain == {
        "model": "echo-small",
        "messages": turns,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 512,
    }
    form = {"name": "answer", "strict": True, "schema": {"type": "object"}}
    assert full == {
        "model": "echo-small",
        "messages": [ASKED[0], {"role": "user", "content": "zwei ü"}],
        "temperature": 0.5,
        "max_tokens": 7,
        "top_k": 5,
        "seed": 3,
        "stop": ["\n", "END"],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "response_format": {"type": "json_schema", "json_schema": form},
        "reasoning_effort": "low",
    }


def test_extra_parameters_never_replace_what_a_request_is_about(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match=r"\['messages', 'n'\]"):
        ask(server, extra='{"n": 2, "messages": []}')
    assert not server.bodies


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_has_every_sample_with_its_text_reasoning_and_logprobs(
    stream: bool, server: OpenAIServer
) -> None:
    server.answer = Answer(
        reasoning="Hm, one.",
        usage={
            "prompt_tokens": 30,
            "completion_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 4},
            "cost": 0.25,
        },
    )
    reply = ask(server, "a b", n=2, top_logprobs=2, stream=stream)
    likely = Logprobs(
        ("a", " b"), (-0.5, -0.5), (("a0", "a1"), (" b0", " b1")), ((0.0, -1.0), (0.0, -1.0))
    )
    assert [(one.text, one.reasoning, one.logprobs) for one in reply.samples] == [
        ("a b", "Hm, one.", likely)
    ] * 2
    assert sum(sample.tokens for sample in reply.samples) == 11
    assert reply.usage == Usage(30, 20, 4, 0.25)
    assert (reply.first_token_seconds is not None) == stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_read_under_either_of_its_names(
    key: Any, stream: bool, server: OpenAIServer
) -> None:
    server.answer = Answer(reasoning="Well.", reasoning_key=key)
    (sample,) = ask(server, "hello", stream=stream).samples
    assert (sample.reasoning, sample.text) == ("Well.", "hello")


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ("<think>x</think> y", "x", "y"),
        ("\n<think>\nsay so\n</think>\n\nyes\n", "say so", "yes\n"),
        ("<think></think>yes", None, "yes"),
        ("opened by the template\n</think>\n\nyes", "opened by the template", "yes"),
        ("<think>no end", "no end", ""),
        ("a <think>x</think> y", None, "a <think>x</think> y"),
        ("end it with </think> as ever", None, "end it with </think> as ever"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_at_the_beginning_of_a_text_are_its_reasoning(
    content: str, reasoning: str | None, text: str, stream: bool, server: OpenAIServer
) -> None:
    (sample,) = ask(server, content, stream=stream).samples
    assert (sample.text, sample.reasoning) == (text, reasoning)


def test_an_answer_in_parts_is_joined(server: OpenAIServer) -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "yes"}]
    server.answer = Answer(message={"content": parts})
    assert ask(server).samples[0].text == "yes"


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_cut_off_by_the_token_limit_says_so(stream: bool, server: OpenAIServer) -> None:
    (sample,) = ask(server, max_tokens=2, stream=stream).samples
    assert (sample.text, sample.stop_reason) == ("one two", "length")


def test_tokens_of_several_samples_add_up_to_what_the_server_counted(server: OpenAIServer) -> None:
    server.answer = Answer(usage={"completion_tokens": 10})
    (one,) = ask(server).samples
    assert one.tokens == 10
    assert [sample.tokens for sample in ask(server, n=3).samples] in ([3, 4, 3], [3, 3, 4])
    silent = ask(server, "", n=2).samples  # nothing to share by
    assert sum(sample.tokens for sample in silent) == 10


def test_token_ids_are_read_where_the_server_says_them(server: OpenAIServer) -> None:
    (sample,) = ask(server, "token_id:17", top_logprobs=0).samples
    assert sample.logprobs == Logprobs((17,), (-0.5,))


@pytest.mark.parametrize(
    ("ignored", "sampling", "said"),
    [
        ("n", {"n": 3}, "Asked for 3 samples in one request, the server gave 1"),
        ("logprobs", {"top_logprobs": 0}, "ignores `logprobs`"),
        ("top_logprobs", {"top_logprobs": 2}, "Asked for the 2 most likely tokens"),
    ],
)
def test_a_server_that_ignores_what_was_asked_ends_the_run(
    ignored: str, sampling: dict[str, Any], said: str, server: OpenAIServer
) -> None:
    server.answer = Answer(ignores=(ignored,))
    with pytest.raises(ServiceError, match=said):
        ask(server, **sampling)


POLICY = {"message": "No.", "code": "content_policy_violation"}
LONG = {"message": "This model's maximum context length is 8192 tokens.", "param": "messages"}
LONG_IN_VLLM = {
    "message": "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum "
    "context length is 32 tokens and your request has 30 input tokens (512 > 32 - 30).",
    "type": "BadRequestError",
    "param": "max_tokens",
    "code": 400,
}
BUSY = {"message": "Busy."}


@pytest.mark.parametrize(
    ("status", "error", "kind", "type"),
    [
        (400, POLICY, RejectedError, "content policy"),
        (400, {"message": "x", "code": "content_filter"}, RejectedError, "content policy"),
        (400, LONG, RejectedError, "context length"),
        (400, LONG_IN_VLLM, RejectedError, "context length"),
        (400, {"code": "context_length_exceeded"}, RejectedError, "context length"),
        (400, {"message": "odd", "param": "messages[0]"}, RejectedError, "bad request"),
        (413, {"message": "large"}, RejectedError, "bad request"),
        (422, {"message": "odd"}, RejectedError, "bad request"),
        (
            403,
            {"message": "m", "metadata": {"flagged_input": "…"}},
            RejectedError,
            "content policy",
        ),
        (408, BUSY, RetryableError, "time-out"),
        (409, BUSY, RetryableError, "server error"),
        (429, BUSY, RetryableError, "rate limit"),
        (500, BUSY, RetryableError, "server error"),
        (503, BUSY, RetryableError, "server error"),
    ],
)
def test_a_rows_failure_is_told_apart_by_whether_to_ask_again(
    status: int, error: dict[str, Any], kind: type, type: str, server: OpenAIServer
) -> None:
    server.faults.append(Fault("one", status=status, error=error))
    with pytest.raises(kind) as raised:
        ask(server)
    assert (raised.value.type, raised.value.status) == (type, status)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("status", "error", "kind", "said"),
    [
        (401, {"message": "bad key"}, AccessError, "refused the key .*OPENAI_API_KEY"),
        (403, {"message": "not yours"}, AccessError, "refused the key"),
        (402, {"message": "empty"}, AccessError, "out of credit"),
        (429, {"message": "quota", "code": "insufficient_quota"}, AccessError, "out of credit"),
        (400, {"message": "no", "param": "temperature"}, ModelError, "request's temperature"),
        (400, {"message": "no", "code": "unsupported_value"}, ModelError, "Change the recipe's"),
    ],
)
def test_what_would_befall_every_row_ends_the_run(
    status: int, error: dict[str, Any], kind: type, said: str, server: OpenAIServer
) -> None:
    server.faults.append(Fault("one", status=status, error=error))
    with pytest.raises(kind, match=said):
        ask(server)


def test_a_redirection_is_not_followed_with_the_key(server: OpenAIServer) -> None:
    there = {"Location": f"{server.url}/chat/completions"}
    server.faults.append(Fault("one", times=1, status=307, headers=there))
    with pytest.raises(ServiceError, match="found status 307"):
        ask(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "[]",
        "{}",
        '{"choices": []}',
        '{"choices": {}}',
        '{"choices": [null]}',
        '{"choices": [{"message": null, "finish_reason": "stop"}]}',
        '{"choices": [{"finish_reason": "length"}]}',
        '{"choices": [{"message": {"content": null}, "finish_reason": null}]}',
        '{"choices": [{"message": {"content": ""}, "finish_reason": "odd"}]}',
        '{"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}',
        '{"choices": [{"message": {"content": "x"}, "finish_reason": "error"}]}',
        '{"choices": [{"message": {}, "finish_reason": "insufficient_system_resource"}]}',
        '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e30}}',
        '{"choices": null, "error": {"message": "upstream died", "code": 502}}',
    ],
)
def test_an_answer_that_is_none_may_be_asked_for_again(body: str, server: OpenAIServer) -> None:
    server.faults.append(Fault("one", body=body))
    with pytest.raises(RetryableError) as raised:
        ask(server)
    upstream = "upstream" in body
    assert raised.value.most_attempts == (None if upstream else 3)


@pytest.mark.parametrize(
    ("answer", "type"),
    [
        (Answer(finish_reason="content_filter"), "content policy"),
        (Answer(message={"content": None, "refusal": "I can't."}), "content policy"),
        (Answer(finish_reason="tool_calls", message={"content": None}), "bad request"),
    ],
)
def test_what_a_model_withholds_is_a_rejection(
    answer: Answer, type: str, server: OpenAIServer
) -> None:
    server.answer = answer
    with pytest.raises(RejectedError) as raised:
        ask(server)
    assert raised.value.type == type


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_connection_and_silence_may_be_asked_for_again(
    stream: bool, server: OpenAIServer
) -> None:
    server.faults += [Fault("drop", drop=True), Fault("hang", hang=True)]
    for query, type, timeout in (("drop", "connection", 20), ("hang", "time-out", 0.05)):
        with pytest.raises(RetryableError) as raised:
            ask(server, query, stream=stream, timeout=timeout)
        assert raised.value.type == type


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


def large(size: int) -> bytes:
    body = {"choices": [{"message": {"content": "x" * size}, "finish_reason": "stop"}]}
    return json.dumps(body).encode()


def test_an_answer_that_is_too_large_is_its_rows_failure(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", body=large(MOST_BYTES)))
    with pytest.raises(RequestError, match="at most 16 MiB, unpacked, found a larger") as raised:
        ask(server)
    assert raised.value.type == "too large"
    server.faults[:] = [Fault("one", body=large(MOST_BYTES - 1000))]
    assert len(ask(server).samples[0].text) == MOST_BYTES - 1000


def test_a_stream_that_is_too_large_is_its_rows_failure(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", pieces=[b"data: " + b"x" * (MOST_BYTES + 10)]))
    with pytest.raises(RequestError, match="at most 16 MiB"):
        ask(server, stream=True)


def test_a_small_answer_that_unpacks_to_a_large_one_is_not_unpacked_whole(
    server: OpenAIServer,
) -> None:
    packed = gzip.compress(bytes(512 << 20), compresslevel=1)
    server.faults.append(Fault("one", body=packed, headers={"Content-Encoding": "gzip"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="at most 16 MiB"):
            asyncio.run(sampler.sample([{"role": "user", "content": "one"}], Sampling()))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_packed_answer_is_read(server: OpenAIServer) -> None:
    packed = gzip.compress(large(1000))
    server.faults.append(Fault("one", body=packed, headers={"Content-Encoding": "gzip"}))
    assert ask(server).samples[0].text == "x" * 1000


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405, 418, 421, 424, 426, 451, 460, 499])
def test_no_status_of_one_row_among_answers_ends_the_run(status: int, server: OpenAIServer) -> None:
    """All are asked at once: the odd one is refused before any other is answered."""
    server.faults.append(Fault("odd", status=status, error={"message": "odd"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)

    async def all_of_them() -> list[Any]:
        queries = ["odd", "good", "odd", "fine"]
        asked = (sampler.sample([{"role": "user", "content": one}], Sampling()) for one in queries)
        return await asyncio.gather(*asked, return_exceptions=True)

    first, good, second, fine = asyncio.run(all_of_them())
    assert [type(one) for one in (good, fine)] == [Reply, Reply]
    for refused in (first, second):
        assert isinstance(refused, RetryableError)
        assert "odd" in str(refused)


def test_a_refusal_that_all_rows_get_ends_the_run_however_many_are_asked(
    server: OpenAIServer,
) -> None:
    server.faults.append(Fault("", status=404, error={"message": "no such path"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)

    async def all_of_them() -> list[Any]:
        asked = (sampler.sample([{"role": "user", "content": "x"}], Sampling()) for _ in range(5))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(one) for one in asyncio.run(all_of_them())] == [ModelError] * 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_that_the_server_repeats_is_in_no_error(
    stream: bool, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "team-7f3a9c21-gateway"
    said = {"message": f"Incorrect API key provided: {key}"}
    sampler = OpenAISampler("echo-small", base_url=server.url, api_key=f" {key}\r\n", stream=stream)
    for fault in (
        Fault("one", status=401, error=said),
        Fault("one", status=400, error=said),
        Fault("one", status=500, error=said),
        Fault("one", body=f"<html>{key}</html>"),
        Fault("one", body=json.dumps({"error": said})),
        Fault("one", body=f"data: {json.dumps({'error': said})}\n\n"),
    ):
        server.faults[:] = [fault]
        with pytest.raises(DistillError) as raised:
            asyncio.run(sampler.sample([{"role": "user", "content": "one"}], Sampling()))
        assert key not in str(raised.value)
        assert "[hidden]" in str(raised.value)
    assert server.keys[-1] == f"Bearer {key}"


def test_a_time_out_may_be_set_and_changed_between_requests(server: OpenAIServer) -> None:
    server.faults.append(Fault("hang", hang=True))
    sampler = open_openai(server, timeout=0.05)

    async def one_after_the_other() -> tuple[RetryableError, Reply]:
        with pytest.raises(RetryableError, match=r"within 0\.05 s") as raised:
            await sampler.sample([{"role": "user", "content": "hang"}], Sampling())
        sampler.endpoint.timeout = 30
        return raised.value, await sampler.sample([{"role": "user", "content": "go"}], Sampling())

    error, reply = asyncio.run(one_after_the_other())
    assert (error.type, reply.samples[0].text) == ("time-out", "go")


def open_openai(server: OpenAIServer, timeout: float) -> OpenAISampler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.url)
        found = open_sampler("openai:echo-small", timeout=timeout)
    assert isinstance(found, OpenAISampler)
    return found


def test_the_query_of_a_base_url_goes_with_every_request(server: OpenAIServer) -> None:
    for url in ("?api-version=1", "/?api-version=1", "/chat/completions?api-version=1"):
        sampler = OpenAISampler("echo-small", base_url=f" {server.url}{url} ")
        sampler.reach()
        asyncio.run(sampler.sample([{"role": "user", "content": "hi"}], Sampling()))
        assert sampler.identity == OpenAISampler("echo-small", base_url=server.url).identity
    assert server.queries == ["api-version=1"] * 6


def test_a_proxy_that_is_dead_is_named_and_a_living_one_is_used(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as gone:
        dead = gone.url.removesuffix("/v1").replace("http://", "http://me:secret@")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://llm.internal/v1")
    monkeypatch.setenv("ALL_PROXY", dead)
    sampler = OpenAISampler("echo-small")
    asked = [{"role": "user", "content": "hi"}]
    with pytest.raises(
        ServiceError, match=r"through the proxy http://127\.0\.0\.1:\d+.* \(ALL_P"
    ) as at_once:
        sampler.reach()
    with pytest.raises(
        RetryableError, match=r"proxy http://127\.0\.0\.1:\d+.* \(ALL_PROXY\)"
    ) as later:
        asyncio.run(sampler.sample(asked, Sampling()))
    assert "secret" not in f"{at_once.value} {later.value}"
    monkeypatch.setenv("ALL_PROXY", server.url.removesuffix("/v1"))  # it answers for any host
    OpenAISampler("echo-small").reach()
    reply = asyncio.run(OpenAISampler("echo-small").sample(asked, Sampling()))
    assert reply.samples[0].text == "hi"
    monkeypatch.setenv("ALL_PROXY", dead)
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    OpenAISampler("echo-small", base_url=server.url).reach()


def test_newer_models_get_the_name_of_the_length_limit_that_they_know(
    server: OpenAIServer,
) -> None:
    server.refuses_max_tokens = True
    sampler = OpenAISampler("echo-small", base_url=server.url)

    async def twice() -> None:
        for query in ("one", "two"):
            await sampler.sample([{"role": "user", "content": query}], Sampling(max_tokens=9))

    asyncio.run(twice())
    limits = [{key for key in body if "tokens" in key} for body in server.bodies]
    assert limits == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m1s"}, 361),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "120ms"}, None),
    ],
)
def test_how_long_to_wait_is_read_from_the_headers(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert read_retry_after(headers) == pytest.approx(seconds)


def test_a_date_to_wait_for_is_in_seconds_from_now() -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (read_retry_after({"retry-after": when}) or 0) <= 100
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    assert read_retry_after({"retry-after": past}) == 0


def test_a_refusal_carries_the_wait_that_the_server_asked_for(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RetryableError) as raised:
        ask(server)
    assert raised.value.retry_after == 7


def test_a_reply_says_what_is_left_to_ask(server: OpenAIServer) -> None:
    assert ask(server).allowance is None
    server.answer = Answer(
        headers={
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-tokens": "149984",
            "x-ratelimit-reset-tokens": "1h2m3.5s",
        }
    )
    assert ask(server).allowance == Allowance(59, 1, 149984, 3723.5)
    assert read_allowance({"x-ratelimit-remaining-tokens": "1"}) == Allowance(None, None, 1, None)


def test_an_unknown_model_is_told_the_near_names(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match=r"knows no 'echo-smal' .*Near names: \['echo-small'"):
        ask(server, model="echo-smal")


def test_a_key_is_needed_away_from_this_machine_and_its_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url in (None, "https://api.example.com/v1"):
        with pytest.raises(AccessError, match="set OPENAI_API_KEY"):
            OpenAISampler("m", base_url=url)
    for host in ("localhost", "127.0.0.1", "[::1]", "10.1.2.3", "vllm", "gpu.local"):
        OpenAISampler("m", base_url=f"http://{host}:8000/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    assert OpenAISampler("m").endpoint.url.host == "api.openai.com"


@pytest.mark.parametrize(
    "text", ["localhost:8000", "ftp://x/v1", "http://", "http://[x", "http://me:secret@x/v1"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="OPENAI_BASE_URL") as raised:
        OpenAISampler("m", base_url=text, api_key="k")
    assert "secret" not in str(raised.value)


def test_the_identity_tells_endpoints_apart_and_never_the_key() -> None:
    def identity(url: str | None, key: str = "sk-secret") -> str:
        return OpenAISampler("org/m", base_url=url, api_key=key).identity

    assert identity(None) == "openai:org/m"
    assert identity("https://api.openai.com/v1/") == "openai:org/m"
    assert identity("http://10.0.0.1:8000/v1") == "openai:org/m@10.0.0.1:8000"
    assert identity("https://gate.example/openai/v1") == "openai:org/m@gate.example/openai"
    assert identity("https://gate.example/v1", "a") == identity("https://gate.example/v1", "b")


def test_the_key_is_sent_and_a_refused_one_is_noticed_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(key="sk-good") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-bad")
        with pytest.raises(AccessError, match="refused the key"):
            open_sampler("openai:echo-small")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-good")
        sampler = open_sampler("openai:echo-small")
        reply = asyncio.run(sampler.sample([{"role": "user", "content": "hi"}], Sampling()))
        assert reply.samples[0].text == "hi"


def test_a_sampler_that_is_opened_lazily_needs_a_key_only_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask_twice(sampler: Sampler) -> list[object]:
        both = (sampler.sample([{"role": "user", "content": "hi"}], Sampling()) for _ in range(2))
        return await asyncio.gather(*both, return_exceptions=True)

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sampler = open_sampler("openai:m", lazily=True)
    assert sampler.identity == "openai:m"
    assert [type(found) for found in asyncio.run(ask_twice(sampler))] == [AccessError] * 2
    with serving(key="sk-good") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-good")
        sampler = open_sampler("openai:echo-small", lazily=True)
        assert server.keys == []
        assert all(isinstance(found, Reply) for found in asyncio.run(ask_twice(sampler)))
        assert len(server.keys) == 3  # one look for both


def test_a_key_goes_to_its_own_address_alone(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with serving() as other:
        server.moved_to = f"{other.url}/models"
        OpenAISampler("echo-small", base_url=server.url).reach()
        assert (server.keys, other.keys) == (["Bearer sk-mine"], [None])


def test_a_server_that_is_not_there_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        url = server.url
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ServiceError, match="Can't reach"):
        open_sampler("openai:echo-small")


def test_a_reference_without_a_model_or_with_a_renderer_is_refused() -> None:
    for options in ({"reference": "openai:"}, {"reference": "openai:m", "renderer": "qwen3"}):
        with pytest.raises(ModelError, match="the server itself renders"):
            open_sampler(**options)


def test_only_what_can_be_streamed_is(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match="Only 'openai:' models are streamed"):
        open_sampler("pocket", stream=True)


def test_one_sampler_serves_many_event_loops_and_leaves_nothing_open(
    server: OpenAIServer,
) -> None:
    script = f"""
import asyncio
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.openai.client import OpenAISampler
sampler = OpenAISampler("echo-small", base_url={server.url!r})
async def ask():
    for query in "ab":
        reply = await sampler.sample([{{"role": "user", "content": query}}], Sampling())
        assert reply.samples[0].text == query
async def close():
    await ask()
    await sampler.close()
    await ask()
for run in (ask, ask, close):
    asyncio.run(run())
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_recipe_with_a_schema_is_asked_and_read_by_it(
    server: OpenAIServer, recipe_folder: Path, tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}}
    recipe = recipe_folder / "recipe.yaml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("answer:")]
    answer = json.dumps({"json_schema": schema, "field": "colour"})
    recipe.write_text("\n".join([*lines, f"answer: {answer}"]))
    queries = ['{"colour": "red"}', '{"colour": "green"}', "{}", "red"]
    rows = (json.dumps({"query": query, "family": query}) for query in queries)
    (recipe_folder / "queries.jsonl").write_text("\n".join(rows))
    recipe.write_text(recipe.read_text().replace(", reference: colour", ""))
    teacher = OpenAISampler("echo-small", base_url=server.url)
    found = generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert found.rows["answer"][:] == ["red", None, None, None]
    assert found.rows["rejection"][:] == [None, "off schema", "off schema", "unparsable"]
    assert found.rows["response"][0] == "It is red."
    form = {"name": "answer", "strict": True, "schema": schema}
    asked = {"type": "json_schema", "json_schema": form}
    assert all(body["response_format"] == asked for body in server.bodies)


def test_n_samples_are_n_rows_of_one_request(
    server: OpenAIServer, recipe_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "sampling: {n: 3, temperature: 1, top_logprobs: 1}\n")
    teacher = OpenAISampler("echo-small", base_url=server.url)
    found = generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert found.rows["sample"][:] == [0, 1, 2] * 6
    assert len(server.bodies) == 6
    again = generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert again.rows[:] == found.rows[:]
    assert len(server.bodies) == 6


def test_a_streamed_run_journals_the_time_to_each_first_token_and_has_the_same_rows(
    server: OpenAIServer, recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    runs = [
        generate(
            recipe_folder,
            teacher="openai:echo-small",
            out=tmp_path / name,
            settings=GenerateSettings(stream=stream),
        )
        for name, stream in (("whole", False), ("streamed", True))
    ]
    assert runs[0].rows[:] == runs[1].rows[:]
    for run, stream in zip(runs, (False, True), strict=True):
        with Journal(run.path / "journal.sqlite") as journal:
            replies = [journal.get(digest) for digest, _ in journal]
        assert [reply.first_token_seconds is not None for reply in replies] == [stream] * 6
    assert runs[0].first_token is None
    seconds = sorted(reply.first_token_seconds for reply in replies)
    assert runs[1].first_token == {
        "answers": 6,
        "median": (seconds[2] + seconds[3]) / 2,
        "p95": seconds[5],
    }
    assert (
        generate(recipe_folder, teacher="openai:echo-small", out=tmp_path / "streamed") == runs[1]
    )


def test_generating_leaves_no_connection_open(
    server: OpenAIServer, recipe_folder: Path, tmp_path: Path
) -> None:
    teacher = OpenAISampler("echo-small", base_url=server.url)
    generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert not teacher.endpoint._sessions
