"""OpenAI's protocol of `serve`, asked by the real client, by plain HTTP, and by this package."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker
import torch

from distill_datasets.embedded.wire import pb
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.references import open_sampler
from distill_datasets.models.renderers import load_tokenizer
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.serving.answers import ChatFormat, ChatReader, Choice, LiveRequest
from distill_datasets.serving.protocol import read_chat
from tests.support.recipes import any_recipe
from tests.support.serving import KEY, Address, serving
from tests.support.tiny_model import TOOLS_CHAT, make_tiny_model
from tests.support.training_runs import ROWS

torch.set_num_threads(1)
QUERIES = ("What language is this?", "Der Himmel ist blau.", "<|im_end|> eight 9", "El cielo")
SCHEMA = {
    "type": "object",
    "properties": {"code": {"enum": ["en", "de"]}, "sure": {"type": "boolean"}},
    "required": ["code", "sure"],
    "additionalProperties": False,
}
Asked = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("serving") / "tiny", TOOLS_CHAT, context=4096)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    recipe = any_recipe(prompt="Reply with the code of the language and nothing else.")
    with serving(model, store=tmp_path_factory.mktemp("store"), recipe=recipe) as address:
        yield address


@pytest.fixture
def client(server: Address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def chat(client: openai.OpenAI) -> Asked:
    def chat(text: str = QUERIES[0], **settings: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        given = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0}
        return client.chat.completions.create(**{**given, **settings})

    return chat


def post(server: Address, path: str, body: Any, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.openai}/{path}", json=body, headers=headers, timeout=60)


def test_it_answers_as_over_tinkers_protocol_token_by_token(
    server: Address, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.openai)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    over_openai = open_sampler("openai:tiny", stream=True)
    connection = Connection(
        "tinker:tiny", service, "tiny", str(model), "distill_datasets/chat_template"
    )
    over_tinker = TinkerSampler(connection)
    plain = Sampling(temperature=0, max_tokens=24, top_logprobs=3)
    by_id = Sampling(
        temperature=0,
        max_tokens=24,
        top_logprobs=3,
        extra='{"return_tokens_as_token_ids": true}',
    )

    async def both() -> list[tuple[Reply, Reply]]:
        found = []
        for query in QUERIES:
            asked: Any = [{"role": "user", "content": query}]
            found.append(
                (await over_tinker.sample(asked, plain), await over_openai.sample(asked, by_id))
            )
        await over_openai.close()  # type: ignore[attr-defined]
        return found

    for tinkers, openais in asyncio.run(both()):
        assert openais.samples == tinkers.samples
        assert openais.usage.prompt_tokens == tinkers.usage.prompt_tokens
        assert openais.tokens == tinkers.tokens


@pytest.mark.parametrize("text", QUERIES)
def test_chunks_joined_are_the_whole(chat: Asked, text: str) -> None:
    whole = chat(text, n=2, temperature=1, seed=3, stop=["e", "77"], logprobs=True)
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chat(
        text,
        **{"n": 2, "temperature": 1, "seed": 3, "stop": ["e", "77"], "logprobs": True},
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for part in chunk.choices:
            found = choices.setdefault(part.index, {"text": "", "logprobs": [], "reason": None})
            found["text"] += part.delta.content or ""
            found["logprobs"] += part.logprobs.content if part.logprobs else []
            found["reason"] = part.finish_reason or found["reason"]
    for choice in whole.choices:
        found = choices[choice.index]
        assert found["text"] == choice.message.content
        assert found["reason"] == choice.finish_reason
        assert found["logprobs"] == choice.logprobs.content
        assert "e" not in choice.message.content
    assert usage is not None
    assert usage.completion_tokens == sum(len(found["logprobs"]) for found in choices.values())


def test_penalties_keep_an_answer_from_repeating_itself(chat: Asked) -> None:
    def drawn(**penalties: float) -> list[str]:
        said = chat(logprobs=True, max_tokens=60, **penalties).choices[0]
        return [one.token for one in said.logprobs.content]

    plain, kept = drawn(), drawn(frequency_penalty=2, presence_penalty=2)
    assert len(set(kept)) / len(kept) > len(set(plain)) / len(plain)
    assert drawn(frequency_penalty=0, presence_penalty=0) == plain


def test_a_seed_repeats_an_answer_and_every_choice_is_another(chat: Asked) -> None:
    first, again = (chat(n=3, temperature=1, seed=7) for _ in range(2))
    said = [one.message.content for one in first.choices]
    assert said == [one.message.content for one in again.choices]
    assert len({*said}) == 3
    assert [one.index for one in first.choices] == [0, 1, 2]


def test_a_schema_holds_whatever_the_model_would_say(chat: Asked) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for stream in (False, True):
        found = chat(
            n=8, temperature=1, seed=1, max_tokens=300, response_format=form, stream=stream
        )
        if stream:
            texts = [""] * 8
            for chunk in found:
                for part in chunk.choices:
                    texts[part.index] += part.delta.content or ""
        else:
            texts = [one.message.content for one in found.choices]
            assert {one.finish_reason for one in found.choices} == {"stop"}
        for text in texts:
            answer = json.loads(text)
            assert [*answer] == ["code", "sure"]
            assert answer["code"] in ("en", "de")
            assert isinstance(answer["sure"], bool)
    loose = chat(temperature=1, seed=2, max_tokens=200, response_format={"type": "json_object"})
    assert loose.choices[0].message.content.startswith("{")


def test_a_recipes_schema_holds_through_an_openai_reference(
    server: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.openai)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "queries.txt").write_text("\n".join(row["query"] for row in ROWS[:6]))
    recipe = any_recipe(
        folder=tmp_path,
        teacher="openai:tiny",
        queries={"file": "queries.txt"},
        answer={"json_schema": SCHEMA},
        sampling={"temperature": 1.0, "max_tokens": 300, "seed": 5},
    )
    made = generate(recipe, out=tmp_path / "run", settings=GenerateSettings())
    assert (made.kept, made.rejected) == (6, {})


def test_a_prompts_own_logprobs_come_with_echo(
    client: openai.OpenAI, server: Address, model: Path
) -> None:
    tokens = [70, 71, 72, 73, 74, 75]
    asked = {"model": "tiny", "prompt": [tokens], "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = post(server, "completions", asked).json()["choices"]
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    sampler = service.create_sampling_client(base_model="tiny").result(60)
    prompt = tinker.ModelInput.from_ints(tokens)
    expected = sampler.compute_logprobs(prompt).result(60)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected)
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    several = client.completions.create(
        model="tiny", prompt=["What language", "Der Himmel"], n=2, max_tokens=5, temperature=0
    )
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    parts = client.completions.create(
        model="tiny",
        prompt=["What language", "Der Himmel"],
        n=2,
        max_tokens=5,
        temperature=0,
        stream=True,
    )
    texts = [""] * 4
    for chunk in parts:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in several.choices]


def test_models_are_listed_and_the_prompt_goes_before_what_is_asked(
    client: openai.OpenAI, chat: Asked
) -> None:
    assert [one.id for one in client.models.list()] == ["tiny", "tiny+prompt"]
    assert client.models.retrieve("tiny+prompt").object == "model"
    prompt: Any = {
        "role": "system",
        "content": "Reply with the code of the language and nothing else.",
    }
    asked: Any = {"role": "user", "content": QUERIES[0]}
    written, put = chat(messages=[prompt, asked]), chat(model="tiny+prompt")
    assert put.choices == written.choices
    assert put.usage.prompt_tokens == written.usage.prompt_tokens
    assert chat().usage.prompt_tokens < put.usage.prompt_tokens


def test_a_prompt_that_came_before_is_read_from_the_cache(chat: Asked) -> None:
    long = "The weather today is fine. " * 12
    for text in ("first", "second"):
        chat(long + text)
    found = chat(long + "third").usage
    assert 24 <= found.prompt_tokens_details.cached_tokens < found.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "gone"}, 404, "this server has ['tiny', 'tiny+prompt']"),
        ({"messages": []}, 400, "expected messages as a list"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "expected a role of"),
        ({"temperature": 3}, 400, "expected temperature in 0.0..2.0"),
        ({"n": 0}, 400, "expected n in 1..128"),
        ({"max_tokens": 10**6}, 400, "within the context of 4096 tokens"),
        ({"frequency_penalty": 3}, 400, "expected frequency_penalty in -2.0..2.0"),
        ({"logit_bias": {"5": 1}}, 400, "expected logit_bias of {}"),
        ({"guided_regex": "a"}, 400, "no 'guided_regex'"),
        ({"top_logprobs": 3}, 400, "expected logprobs: true"),
        ({"stop": [""]}, 400, "none empty"),
        ({"tools": [{"name": "?"}]}, 400, "expected a function with a name"),
        ({"tool_choice": "required", "tools": []}, 400, "'required' or the function of one"),
        ({"response_format": {"type": "xml"}}, 400, "expected response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "string", "pattern": "(?=a)b"}},
                }
            },
            400,
            "that an answer can be held to",
        ),
    ],
)
def test_what_cant_be_done_is_refused_in_openais_form(
    server: Address, changes: dict[str, Any], status: int, says: str
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **changes}
    for stream in (False, True):
        found = post(server, "chat/completions", {**body, "stream": stream})
        assert found.status_code == status
        error = found.json()["error"]
        assert says in error["message"]
        assert error["type"] == "invalid_request_error"


def test_keys_paths_and_broken_bodies_are_refused(server: Address) -> None:
    found = post(server, "chat/completions", {}, key="tml-another")
    assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.openai}/models").status_code == 401
    missing = post(server, "embeddings", {})
    assert missing.status_code == 404
    assert "no such endpoint" in missing.json()["error"]["message"]
    headers = {"Authorization": f"Bearer {KEY}"}
    deep = b'{"a":' + b"[" * 100_000
    for content in (b"{", b"[1]", b'{"a": NaN}', deep, b"\xff"):
        url = f"{server.openai}/chat/completions"
        found = httpx.post(url, content=content, headers=headers)
        assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(
    server: Address,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    given_up, began = threading.Event(), threading.Event()
    drawn: list[int] = []

    def resolved(self: LiveRequest, payload: Any, *, real: Any = LiveRequest._resolve) -> None:
        drawn.append(len(pb.SampleResponse.FromString(payload).sequences[0].tokens) // 4)
        given_up.set()
        real(self, payload)

    def watched(self: LiveRequest, *one: Any, real: Any = LiveRequest._watch) -> bool:
        began.set()
        return bool(real(self, *one))

    monkeypatch.setattr(LiveRequest, "_resolve", resolved)
    monkeypatch.setattr(LiveRequest, "_watch", watched)
    body = json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 4000,
            "temperature": 1,
            "stream": stream,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "string", "minLength": 3990}},
            },
        }
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", f"Authorization: Bearer {KEY}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", body]
        connection.sendall("\r\n".join(lines).encode())
        assert began.wait(60)
        heard = b""
        while stream and b"data:" not in heard:
            heard += connection.recv(4096)
    assert given_up.wait(60)
    assert drawn[0] < 4000
    for _ in range(3):  # whatever the server says of it, it has said by now
        assert post(server, "nothing", {}).status_code == 404
    assert not [one for one in caplog.records if "Error handling" in one.getMessage()]


def test_calls_of_tools_come_as_openai_has_them(server: Address, chat: Asked) -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    with_tool, without = chat(tools=[tool]), chat(tools=[tool], tool_choice="none")
    assert with_tool.usage.prompt_tokens > without.usage.prompt_tokens
    both = {"response_format": {"type": "json_object"}, "tools": [tool]}
    messages = [{"role": "user", "content": "a"}]
    found = post(server, "chat/completions", {"model": "tiny", "messages": messages, **both})
    assert found.status_code == 400


def tool(name: str, *letters: str) -> dict[str, Any]:
    letter = {"type": "string", "enum": letters}
    schema = {"type": "object", "properties": {"a": letter}, "required": ["a"]}
    schema["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_as_its_schema_says(chat: Asked, stream: bool) -> None:
    tools = [tool("f", "one", "two"), tool("g", "six")]
    named = {"type": "function", "function": {"name": "g"}}
    for choice, names in (("required", {"f", "g"}), (named, {"g"})):
        settings = {"temperature": 1, "seed": 5, "max_tokens": 200, "stream": stream}
        made = chat(tools=tools, tool_choice=choice, **settings)
        if stream:
            *_, last = made
            (call,) = last.choices[0].delta.tool_calls
        else:
            (last,) = made.choices
            (call,) = last.message.tool_calls
            assert last.message.content is None and last.finish_reason == "tool_calls"
        assert call.function.name in names
        allowed = {"f": {"one", "two"}, "g": {"six"}}[call.function.name]
        assert json.loads(call.function.arguments)["a"] in allowed
    cut = chat(tools=tools, tool_choice="required", max_tokens=3)
    if not stream:
        assert cut.choices[0].finish_reason == "length" and not cut.choices[0].message.tool_calls


@pytest.mark.parametrize("thinks", [False, True])
def test_words_thoughts_and_calls_are_told_apart_while_they_come(model: Path, thinks: bool) -> None:
    tokenizer = load_tokenizer(str(model))
    format = ChatFormat(tokenizer, "distill_datasets/chat_template")
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stop": "STOP"}
    read = read_chat(asked)
    opened = "" if thinks else "<think>"
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text = f"{opened}\nThe user asks ü.\n</think>\n\nLet me see ü 🙂.\n{call}<|im_end|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    reader = ChatReader(format, read, "[]", thinks)
    choice, pieces = Choice(reader), []
    for token in tokens:
        choice.add([(token, 0.0)])
        pieces.append(choice.news())
    said = reader.read(tokens)
    assert said.content == "Let me see ü 🙂."
    assert said.reasoning == "The user asks ü."
    assert [one["function"] for one in said.calls] == [{"name": "f", "arguments": '{"a": 1}'}]
    assert "".join(pieces) + str(choice.rest(said.content, "")) == said.content
    assert sum(map(bool, pieces)) > 3, "words come as they are drawn"


def test_thoughts_that_nothing_opened_are_sent_as_they_were_drawn(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    format = ChatFormat(tokenizer, "distill_datasets/chat_template")
    read = read_chat({"model": "tiny", "messages": [{"role": "user", "content": "a"}]})
    reader = ChatReader(format, read, None, thinks=False)
    choice, sent = Choice(reader), ""
    text = "It is blue.\n</think>\nNo: it is red."
    tokens = tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
    for token in tokens:
        choice.add([(token, 0.0)])
        sent += choice.news()
    assert sent.startswith("It is")
    assert sent + str(choice.rest(reader.read(tokens).content, reader.plain(tokens))) == text
