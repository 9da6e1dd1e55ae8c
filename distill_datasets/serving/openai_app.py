"""The endpoints of OpenAI's protocol: keys, refusals, streams, and clients that go away."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from distill_datasets.embedded.wire import (
    LARGEST_BODY,
    DrawnSample,
    InvalidRequestError,
    MissingError,
    SampleRequest,
    read_json,
    read_sample_request,
)
from distill_datasets.errors import DistillError, RetryableError, ServiceError

from .answers import (
    BodyWriter,
    ChatReader,
    Choice,
    ResponseReader,
    TextReader,
    usage,
)
from .live import LiveRequest, Outcome
from .requests import RequestSettings, read_chat, read_text
from .served import Catalogue, Served

if TYPE_CHECKING:
    from distill_datasets.embedded.engine import Service
    from distill_datasets.embedded.logits import Constrain

# Requests that may wait or run at once; each holds its connection.
MOST_WAITING = 4096
_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_INVALID = "invalid_request_error"


def openai_app(service: Service, models: Catalogue, api_key: str) -> web.Application:
    """An application for `/v1`, for the same key as the one around it."""
    app = web.Application(middlewares=[_gate(api_key)])
    endpoints = _Endpoints(service, models)
    app.router.add_get("/models", endpoints.list_models)
    app.router.add_get("/models/{name:.+}", endpoints.get_model)
    app.router.add_post("/chat/completions", endpoints.chat)
    app.router.add_post("/completions", endpoints.text)
    return app


def refused(
    status: int, message: str, *, kind: str = _INVALID, code: str | None = None
) -> web.Response:
    """A refusal in the protocol's form."""
    return web.json_response({"error": error_body(message, kind, code)}, status=status)


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in the protocol's form."""
    return {"message": message, "type": kind, "param": None, "code": code}


def _gate(api_key: str) -> Middleware:
    expected = api_key.encode()

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        found = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(found.encode("utf-8", "surrogateescape"), expected):
            return refused(
                401,
                "expected the key of this server as 'Authorization: Bearer <key>'; found "
                f"{'another' if found else 'none'}: set OPENAI_API_KEY to the key that serve "
                "prints, or was started with",
                code="invalid_api_key",
            )
        try:
            return await handler(request)
        except _EXPLAINED as error:
            return _explained(error)

    return gate


# What a request may raise; the last one where it is nested too deeply.
_EXPLAINED = (
    *(DistillError, web.HTTPException, web.RequestPayloadError, UnicodeError),
    RecursionError,
)
# What an error of ours is in the protocol: a status, a type and a code.
_MEANINGS: Sequence[tuple[type[Exception], tuple[int, str, str | None]]] = (
    (MissingError, (404, _INVALID, "model_not_found")),
    (RetryableError, (429, "rate_limit_error", "rate_limit_exceeded")),
    (ServiceError, (500, "server_error", None)),
    (DistillError, (400, _INVALID, None)),
)


def _explained(error: Exception) -> web.Response:
    for kind, (status, name, code) in _MEANINGS:
        if isinstance(error, kind):
            return refused(status, str(error), kind=name, code=code)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return refused(413, f"expected at most {LARGEST_BODY} bytes in a request; found more")
    if isinstance(error, web.HTTPException):  # a path or a method that is not here
        return refused(error.status, f"this server has no such endpoint: {error.reason}")
    return refused(400, f"the request can't be read: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Completion:
    """One answer in the making: its requests, and how they are read and written."""

    writer: BodyWriter
    reader: ResponseReader
    requests: Sequence[LiveRequest]
    lengths: Sequence[int]

    @property
    def asked(self) -> RequestSettings:
        return self.writer.asked

    async def whole(self) -> web.Response:
        """The answer in one body."""
        outcomes = [await one.outcome() for one in self.requests]
        samples = [sample for one in outcomes for sample in one.samples]
        choices = [self.writer.choice(n, self.reader, one) for n, one in enumerate(samples)]
        body = {**self.writer.body(choices), "usage": usage(self.lengths, outcomes)}
        return web.json_response(body)

    async def echo(self, prompts: Sequence[list[int]], *, only: bool) -> web.Response:
        """The answer in one body, each choice behind its prompt; with `only` that alone."""
        outcomes = [await one.outcome() for one in self.requests]
        choices: list[dict[str, Any]] = []
        for tokens, outcome in zip(prompts, outcomes, strict=True):
            if only:
                outcome.samples[:] = [DrawnSample([], [], [], False)] * self.asked.n
            for sample in outcome.samples:
                choices.append(self.writer.echo(len(choices), self.reader, tokens, outcome, sample))
        body = {**self.writer.body(choices), "usage": usage(self.lengths, outcomes)}
        return web.json_response(body)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The answer in events; what fails before the first is a plain refusal."""
        stream, outcomes = _Events(request, self.writer), list[Outcome]()
        try:
            for first, live in zip(count(0, self.asked.n), self.requests):
                outcomes.append(await self._stream_one(first, live, stream))
            if self.asked.usage:
                await stream.send([], usage=usage(self.lengths, outcomes))
            await stream.close()
        except DistillError as error:
            if not stream.begun:
                raise
            with suppress(ConnectionResetError):
                await stream.fail(str(error))
        except ConnectionResetError:  # the client went away
            pass
        return stream.response

    async def _stream_one(self, first: int, live: LiveRequest, stream: _Events) -> Outcome:
        """Send what one request draws, its samples numbered from `first`."""
        choices = [Choice(self.reader) for _ in range(self.asked.n)]
        while drawn := await live.drawn():
            for sample in {sample for sample, *_ in drawn}:
                choice = choices[sample]
                choice.add([(token, logprob) for of, token, logprob in drawn if of == sample])
                if text := choice.news():
                    await stream.send([self.writer.delta(first + sample, choice, text)])
        outcome = await live.outcome()
        ended = zip(count(first), choices, outcome.samples, strict=False)
        for index, choice, whole in ended:
            said = self.reader.read(whole.tokens)
            rest = choice.rest(said.content, self.reader.plain(whole.tokens))
            if rest is None:
                raise ServiceError(
                    "this chat format reads an answer otherwise once it is whole: ask for it "
                    "without stream"
                )
            await stream.send([self.writer.last_delta(index, choice, said, rest, whole)])
        return outcome


class _Events:
    """Server-sent events to one client; the first one begins each choice of a chat."""

    def __init__(self, request: web.Request, writer: BodyWriter) -> None:
        self._request, self._writer = request, writer
        self.response, self.begun = web.StreamResponse(headers=_SSE), False
        self._roles = set[int]()

    async def send(self, choices: Sequence[dict[str, Any]], **extra: Any) -> None:
        """Send a chunk."""
        news = [one["index"] for one in choices if one["index"] not in self._roles]
        if self._writer.chat and news:
            self._roles.update(news)
            await self.send([self._writer.first_delta(index) for index in news])
        told: dict[str, Any] = {"usage": None} if self._writer.asked.usage else {}
        await self._write(json.dumps(self._writer.body(choices, chunk=True) | told | extra))

    async def close(self) -> None:
        """End a whole answer."""
        await self._write("[DONE]")

    async def fail(self, message: str) -> None:
        """End an answer that broke off."""
        await self._write(json.dumps({"error": error_body(message, kind="server_error")}))

    async def _write(self, data: str) -> None:
        if not self.begun:
            self.begun = True
            await self.response.prepare(self._request)
        await self.response.write(f"data: {data}\n\n".encode())


class _Endpoints:
    def __init__(self, service: Service, models: Catalogue) -> None:
        self._service, self._models, self._waiting = service, models, 0

    async def list_models(self, _: web.Request) -> web.Response:
        found = [self._told(one) for one in self._models.models.values()]
        return web.json_response({"object": "list", "data": found})

    async def get_model(self, request: web.Request) -> web.Response:
        return web.json_response(self._told(self._models.find(request.match_info["name"])))

    def _told(self, model: Served) -> dict[str, Any]:
        base = self._service.card.name
        return {
            "id": model.name,
            "object": "model",
            "created": self._models.created,
            "owned_by": "local",
            "root": base,
            "parent": None if model.name == base else base,
            "max_model_len": self._service.card.max_context,
        }

    async def chat(self, request: web.Request) -> web.StreamResponse:
        read = read_chat(read_json(await request.read()))
        model, asked = self._models.find(read.asked.model), read.asked
        messages, tools = model.asked(read.messages, read.tools)
        tokens = model.format.prompts.tokens(messages, tools)
        thinks = _thinks(model, tokens)
        if read.calls and thinks:
            raise InvalidRequestError(
                "expected tool_choice of 'auto' or 'none': this model thinks before it calls a tool"
            )
        if read.calls:
            tokens = [*tokens, *model.format.call_opening]
        constrain = None
        if read.schema is not None:
            constrain = await self._service.hold(read.schema, model.format.ends)
        sampled = _sampled(model, asked, tokens, (*asked.stop, *model.format.end_texts))
        reader = ChatReader(model.format, asked, read.messages, tools, thinks, read.calls)
        writer = BodyWriter(True, asked, model.format, self._service.card.fingerprint)
        with self._admitted():
            live = self._live(request, model, asked, sampled, constrain)
            answer = _Completion(writer, reader, [live], [len(tokens)])
            return await (answer.stream(request) if asked.stream else answer.whole())

    async def text(self, request: web.Request) -> web.StreamResponse:
        read = read_text(read_json(await request.read()))
        model, asked = self._models.find(read.asked.model), read.asked
        if model.recipe is not None:
            raise InvalidRequestError(
                f"{model.name!r} puts its prompt before a conversation: ask chat/completions"
            )
        encode = model.format.tokenizer.encode
        prompts = [encode(one) if isinstance(one, str) else one for one in read.prompts]
        scored: dict[str, Any] = {}
        if read.echo and asked.top is not None:
            scored = {"prompt_logprobs": True, "topk_prompt_logprobs": asked.top}
        sampled = [_sampled(model, asked, tokens, asked.stop, **scored) for tokens in prompts]
        writer = BodyWriter(False, asked, model.format, self._service.card.fingerprint)
        with self._admitted():
            live = [self._live(request, model, asked, one) for one in sampled]
            answer = _Completion(
                writer, TextReader(model.format, asked), live, list(map(len, prompts))
            )
            if read.echo:
                return await answer.echo(prompts, only=read.only_echo)
            return await (answer.stream(request) if asked.stream else answer.whole())

    def _live(
        self,
        request: web.Request,
        model: Served,
        asked: RequestSettings,
        sampled: SampleRequest,
        constrain: Constrain | None = None,
    ) -> LiveRequest:
        def left() -> bool:
            return request.transport is None or request.transport.is_closing()

        # The likeliest tokens are known at the end only: with them a stream comes at once.
        stream, service, weights = asked.stream and not asked.top, self._service, model.weights
        return LiveRequest(service, weights, sampled, left, constrain=constrain, stream=stream)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._waiting >= MOST_WAITING:
            message = f"{MOST_WAITING} requests wait already: ask again in a second"
            raise RetryableError(message, type="rate limit")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1


def _sampled(
    model: Served, asked: RequestSettings, tokens: list[int], stops: Sequence[str], **scored: Any
) -> SampleRequest:
    """The request as the embedded server reads its own."""
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "num_samples": asked.n,
        "sampling_params": asked.sampling,
        "topk_sample_logprobs": asked.top or 0,
        **scored,
    }
    return replace(read_sample_request(body), stop=(*model.format.ends, *stops))


def _thinks(model: Served, tokens: Sequence[int]) -> bool:
    """Whether a prompt opens the thoughts of its answer."""
    return str(model.format.tokenizer.decode(tokens[-4:])).rstrip().endswith("<think>")
