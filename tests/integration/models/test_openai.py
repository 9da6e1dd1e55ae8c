import asyncio
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.conversations import Call, split_calls
from distill_datasets.errors import (
    AccessError,
    ModelError,
    RejectedError,
    RetryableError,
    ServiceError,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.openai import OpenAISampler
from distill_datasets.models.references import open_sampler
from distill_datasets.models.retry import read_allowance, read_retry_after
from distill_datasets.models.sampler import Allowance, Logprobs, Sampling, Usage
from tests.support.openai_server import ASKED, Answer, Fault, OpenAIServer, ask


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


TOOLS = json.dumps([{"type": "function", "function": {"name": "find", "parameters": {}}}])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["", "I look."])
def test_calls_are_a_part_of_a_samples_text(words: str, stream: bool, server: OpenAIServer) -> None:
    query = "\n".join([*filter(None, [words]), 'call find {"id": "A-1é"}', 'call find {"id": 2}'])
    reply = ask(server, query, n=2, tools=TOOLS, stream=stream)
    for sample in reply.samples:
        calls = [Call("find", {"id": "A-1é"}), Call("find", {"id": 2})]
        assert split_calls(sample.text) == (words, calls)
        assert sample.stop_reason == "stop"
    assert (reply.first_token_seconds is not None) == stream
    (body,) = server.bodies
    assert body["tools"] == json.loads(TOOLS)
    assert ask(server, query, stream=stream).samples[0].text == query


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_that_are_no_json_are_kept_and_cannot_be_read(
    stream: bool, server: OpenAIServer
) -> None:
    (sample,) = ask(server, 'call find {"id": "A', tools=TOOLS, stream=stream).samples
    assert '"{\\"id\\": \\"A"' in sample.text
    with pytest.raises(ValueError, match="Unterminated string"):
        split_calls(sample.text)


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


def test_a_reference_without_a_model_or_with_a_renderer_is_refused() -> None:
    with pytest.raises(ModelError, match="name the model"):
        open_sampler("openai:")
    with pytest.raises(ModelError, match="the server itself renders"):
        open_sampler("openai:m", renderer="qwen3")


def test_only_what_can_be_streamed_is(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match="Only 'openai:' models are streamed"):
        open_sampler("pocket", stream=True)


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
