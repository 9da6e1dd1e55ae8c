"""A small OpenAI-compatible server on this machine: what it serves, what it saw, what goes wrong.

It answers with the last message. Prompts carry the knobs, so that tests need no other channel:
a `Fault` strikes the requests whose last message holds its text, and where a request has tools a
line `call NAME {"its": "arguments"}` of the last message is a call.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from aiohttp import web

from distill_datasets.models.openai import OpenAISampler
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message
from tests.support.openai_batches import Batches

HOST = "127.0.0.1"
KNOWN = ("echo-large", "echo-small")


@dataclass
class Fault:
    """What goes wrong with requests whose last message holds `text`: `times` of them.

    A `status` is answered with `error` as the body's error; a `body` in place of everything, in
    `pieces` one after the other as a stream. A `hang` answers nothing until the server ends; `drop`
    closes the connection in mid-answer.
    """

    text: str
    times: int = 1_000_000
    status: int = 0
    error: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | bytes | None = None
    pieces: Sequence[bytes] = ()
    hang: bool = False
    drop: bool = False

    def strikes(self, text: str) -> bool:
        """Whether it hits a request; counts it if so."""
        if not self.times or self.text not in text:
            return False
        self.times -= 1
        return True


@dataclass
class Answer:
    """How the server answers: every field is what some real server does."""

    text: str = "{text}"
    reasoning: str | None = None
    reasoning_key: Literal["reasoning_content", "reasoning"] = "reasoning_content"
    finish_reason: str | None = None
    message: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    done: bool = True


class OpenAIServer:
    """The server on a free port, in a thread of its own."""

    def __init__(self, *, key: str | None = None) -> None:
        self.key = key
        self.answer, self.faults = Answer(), list[Fault]()
        self.listed: list[dict[str, Any]] = [{"id": name} for name in KNOWN]
        self.asked: Counter[str] = Counter()  # requests by their last message
        self.bodies: list[dict[str, Any]] = []
        self.refuses_max_tokens, self.moved_to = False, ""
        self.keys: list[str | None] = []
        self.queries: list[str] = []  # of addresses, where there is any
        self.batches = Batches(self)
        self.url = ""
        self._ended = asyncio.Event()

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="openai")
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self.loop).result(30)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._authorized], client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self.batches.add_to(app)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, HOST, 0).start()
        self.url = f"http://{HOST}:{self.runner.addresses[0][1]}/v1"

    async def _end(self) -> None:
        self._ended.set()
        await self.runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    @web.middleware
    async def _authorized(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.queries += filter(None, [request.query_string])
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return refusal(401, message="Incorrect API key", code="invalid_api_key")
        return await handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        if self.moved_to:
            raise web.HTTPTemporaryRedirect(self.moved_to)
        return web.json_response({"object": "list", "data": self.listed})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        self.asked[text] += 1
        if (fault := self.fault(text)) is not None:
            return await self._break(request, fault)
        if "max_tokens" in body and self.refuses_max_tokens:
            said = "'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return refusal(400, message=said, code="unsupported_parameter", param="max_tokens")
        status, completion = self.complete(body)
        if status != 200:
            return web.json_response(completion, status=status)
        if body.get("stream"):
            return await self._stream(request, completion)
        return web.json_response(completion, headers=dict(self.answer.headers))

    def fault(self, text: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.strikes(text)), None)

    async def _break(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.hang:
            await self._ended.wait()
        if fault.drop:
            assert request.transport is not None
            request.transport.abort()
        if fault.pieces:
            return await self._in_pieces(request, fault)
        if fault.body is not None:
            body = fault.body.encode() if isinstance(fault.body, str) else fault.body
            return web.Response(body=body, status=fault.status or 200, headers=fault.headers)
        return refusal(fault.status, headers=fault.headers, **fault.error)

    async def _in_pieces(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in fault.pieces:
            await response.write(piece)
        return response

    def complete(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and the completion of a request, as online and in a batch."""
        if body["model"] not in KNOWN:
            said = f"The model `{body['model']}` does not exist"
            return 404, {"error": {"message": said, "code": "model_not_found"}}
        text, calls = self.answer.text.replace("{text}", body["messages"][-1]["content"]), []
        if body.get("tools"):
            text, calls = called(text)
        count = 1 if "n" in self.answer.ignores else body.get("n", 1)
        choices = [self._choice(index, text, body) for index in range(count)]
        for choice in choices if calls else ():
            choice["message"] |= {"content": text or None, "tool_calls": calls}
            choice["finish_reason"] = self.answer.finish_reason or "tool_calls"
        said = [turn["content"] or "" for turn in body["messages"]]
        usage = {
            "prompt_tokens": sum(len(one.split()) for one in said),
            "completion_tokens": sum(len(words(text)) + 1 for _ in choices),
            **self.answer.usage,
        }
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "choices": choices,
            **({} if "usage" in self.answer.ignores else {"usage": usage}),
        }

    def _choice(self, index: int, text: str, body: Mapping[str, Any]) -> dict[str, Any]:
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10**9
        kept = words(text)[:limit]
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(kept), **self.answer.message},
            "finish_reason": self.answer.finish_reason
            or ("length" if len(kept) < len(words(text)) else "stop"),
        }
        if self.answer.reasoning is not None:
            choice["message"][self.answer.reasoning_key] = self.answer.reasoning
        if body.get("logprobs") and "logprobs" not in self.answer.ignores:
            tops = 0 if "top_logprobs" in self.answer.ignores else body.get("top_logprobs") or 0
            choice["logprobs"] = {"content": [likely(word, tops) for word in kept]}
        return choice

    async def _stream(self, request: web.Request, completion: Mapping[str, Any]) -> web.Response:
        lines = []
        for choice in completion["choices"]:
            message = {**choice["message"], "content": ""}
            lines.append({"index": choice["index"], "delta": message, "finish_reason": None})
            places = (choice.get("logprobs") or {}).get("content")
            message.pop("tool_calls", None)
            for place, word in enumerate(words(choice["message"]["content"] or "")):
                part = {"index": choice["index"], "delta": {"content": word}}
                if places:
                    part["logprobs"] = {"content": [places[place]]}
                lines.append(part)
            pieces = in_turns(choice["message"].get("tool_calls") or ())
            lines += [{"index": choice["index"], "delta": {"tool_calls": [one]}} for one in pieces]
            lines.append({"index": choice["index"], "delta": {}, **only(choice, "finish_reason")})
        chunks = [{"object": "chat.completion.chunk", "choices": [line]} for line in lines]
        if "usage" in completion:
            chunks.append({"choices": [], "usage": completion["usage"]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if not self.answer.done:
            chunks = chunks[: len(chunks) // 2]
        for chunk in chunks:
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if self.answer.done:
            await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response


def words(text: str) -> list[str]:
    """The server's tokens: a word with the space before it."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def called(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The words of a text, and the calls that its other lines ask for."""
    lines = text.split("\n")
    asked = [line.split(" ", 2) for line in lines if line.startswith("call ")]
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (_, name, arguments) in enumerate(asked)
    ]
    return "\n".join(line for line in lines if not line.startswith("call ")), calls


def in_turns(calls: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Streamed pieces of calls: their beginnings, then a few characters of each in turn."""
    for index, call in enumerate(calls):
        yield {**call, "index": index, "function": {**call["function"], "arguments": ""}}
    texts = [call["function"]["arguments"] for call in calls]
    for start in range(0, max(map(len, texts), default=0), 5):
        for index, text in enumerate(texts):
            if piece := text[start : start + 5]:
                yield {"index": index, "function": {"arguments": piece}}


def likely(word: str, tops: int) -> dict[str, Any]:
    """A place's log-probabilities, the likeliest last, as no client may rely on."""
    found = [{"token": f"{word}{rank}", "logprob": -float(rank)} for rank in range(tops)]
    return {"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": found[::-1]}


def only(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: fields[name]}


def refusal(status: int, *, headers: Mapping[str, str] | None = None, **error: Any) -> web.Response:
    return web.json_response({"error": error}, status=status, headers=dict(headers or {}))


@contextmanager
def serving(*, key: str | None = None) -> Iterator[OpenAIServer]:
    """A server that runs as long as the block."""
    server = OpenAIServer(key=key)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving() as started:
        yield started


@pytest.fixture
def named_server(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> OpenAIServer:
    """The one that answers wherever a model is named `openai:`."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    return server


ASKED: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ""}]


def ask(
    server: OpenAIServer,
    query: str = "one two three",
    *,
    model: str = "echo-small",
    stream: bool = False,
    timeout: float = 20,
    **sampling: Any,
) -> Reply:
    """A client's answer to a query behind a prompt."""
    sampler = OpenAISampler(model, base_url=server.url, stream=stream, timeout=timeout)
    messages: list[Message] = [ASKED[0], {"role": "user", "content": query}]
    return asyncio.run(sampler.sample(messages, Sampling(**sampling)))
