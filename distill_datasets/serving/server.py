"""Serves a local model and its students in the foreground, in OpenAI's protocol and in Tinker's.

The base, each student, and each of them with its prompt answer by name; here are the endpoints:
keys, refusals, streams, and clients that go away.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from distill_datasets.embedded.app import OTHER, SERVICE, running
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.process import new_api_key
from distill_datasets.embedded.scheduler import BASE
from distill_datasets.embedded.store import SCHEME, Store
from distill_datasets.embedded.wire import (
    LARGEST_BODY,
    DrawnSample,
    InvalidRequestError,
    MissingError,
    SampleRequest,
    read_json,
    read_sample_request,
)
from distill_datasets.errors import (
    DatasetError,
    DistillError,
    ModelError,
    RetryableError,
    ServiceError,
    SettingsError,
)
from distill_datasets.hub.references import find_release
from distill_datasets.models.references import find_served, find_training, read_training
from distill_datasets.models.renderers import load_tokenizer
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.serving.answers import (
    BodyWriter,
    ChatFormat,
    ChatReader,
    Choice,
    LiveRequest,
    Outcome,
    TextReader,
    usage,
)
from distill_datasets.serving.protocol import (
    INVALID,
    RequestSettings,
    error_body,
    read_chat,
    read_text,
    refused,
    with_prompt,
)
from distill_datasets.serving.settings import ServeSettings

if TYPE_CHECKING:
    from distill_datasets.embedded.engine import Service
    from distill_datasets.recipes.recipe import Recipe

API_KEY = "DISTILL_API_KEY"
_LEAST_KEY = 8
_RENDERERS = {"pocket": "qwen3_instruct"}
_CHAT_TEMPLATE = "distill_datasets/chat_template"
# Behind a model's name: the prompt that it was distilled from is put before what it is asked.
WITH_PROMPT = "+prompt"

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})=(.+)")
# Requests that may wait or run at once; each holds its connection.
MOST_WAITING = 4096
_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


def serve(model: str, settings: ServeSettings) -> None:
    """Serve a local model and students of it until Ctrl-C; says what clients have to export."""
    name, folder = find_served(model)
    dtype = settings.dtype or os.environ.get("EMBEDDED_DTYPE", "auto")
    card = ModelCard.read(folder.resolve(), name, dtype, settings.threads)
    key = _read_key(settings.api_key or os.environ.get(API_KEY))
    chosen = settings.renderer or _RENDERERS.get(model, _CHAT_TEMPLATE)
    format = ChatFormat(load_tokenizer(str(folder)), chosen)
    recipe = None if settings.recipe is None else load_recipe(settings.recipe)
    students = read_names(settings.students)
    if said := card.foretold():
        print(said, file=sys.stderr)
    mounted = partial(mount, api_key=key, format=format, students=students, recipe=recipe)
    try:
        asyncio.run(_until_interrupted(card, key, settings, mounted))
    except DistillError:
        raise
    except OSError as error:
        raise ServiceError(
            f"Can't serve at {settings.host}:{settings.port}: {error}. Choose another --host or "
            "--port."
        ) from error


def mount(
    app: web.Application,
    api_key: str,
    format: ChatFormat,
    students: Mapping[str, str],
    recipe: Recipe | None,
) -> Mapping[str, Served]:
    """Add OpenAI's protocol to an embedded server's application; its models by their names.

    They are the base and `students`, by name and reference, and each of them with its prompt, where
    that is known: by the release that a student was trained on, or else by `recipe`. Raises
    `ModelError` for what can't be served here.
    """
    service = app[SERVICE]
    base = service.card.name
    plain = {base: (Served(base, BASE, format), recipe)}
    for name, reference in students.items():
        if name in plain:
            raise SettingsError(f"Two models are called {name!r}: name one, NAME=PATH.")
        plain[name] = _open_student(service, name, reference, format, recipe)
    models = {name: model for name, (model, _) in plain.items()}
    for name, (model, prompt) in plain.items():
        if prompt is not None:
            prompted = name + WITH_PROMPT
            models[prompted] = replace(model, name=prompted, recipe=prompt)
    openai, endpoints = web.Application(middlewares=[_gate(api_key)]), _Endpoints(service, models)
    openai.router.add_get("/models", endpoints.list_models)
    openai.router.add_get("/models/{name:.+}", endpoints.get_model)
    openai.router.add_post("/chat/completions", endpoints.chat)
    openai.router.add_post("/completions", endpoints.text)
    app.add_subapp(OTHER.rstrip("/"), openai)
    return models


def _read_key(given: str | None) -> str:
    if given is None:
        return new_api_key()
    if len(given) < _LEAST_KEY or not given.isascii() or not given.isprintable() or " " in given:
        raise SettingsError(
            f"Expected a key of at least {_LEAST_KEY} letters, digits and signs without blanks in "
            f"--api-key or {API_KEY}; found one of {len(given)} characters."
        )
    return given


async def _until_interrupted(
    card: ModelCard,
    api_key: str,
    settings: ServeSettings,
    mounted: Callable[[web.Application], Mapping[str, Served]],
) -> None:
    stop, loop, names = asyncio.Event(), asyncio.get_running_loop(), list[str]()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    host, store = settings.host, settings.store
    served = running(
        card,
        store,
        api_key,
        host=host,
        port=settings.port,
        extend=lambda app: names.extend(mounted(app)),
    )
    async with served as port:
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(
            f"export OPENAI_BASE_URL={address}/v1\n"
            f"export OPENAI_API_KEY={api_key}\n"
            f"export TINKER_BASE_URL={address}\n"
            f"export TINKER_API_KEY={api_key}\n"
            f"# models:    {', '.join(names)}\n"
            f"# context:   {card.max_context} tokens, computed in {card.dtype}\n"
            f"# tokenizer: {card.folder} (for the Tinker Cookbook the model_name too)\n"
            f"# store:     {store or 'temporary, removed at the end'}\n"
            "# Ctrl-C ends the server",
            flush=True,
        )
        await stop.wait()


@dataclass(frozen=True)
class Served:
    """A model by its name; `weights` are the engine's name for what computes it."""

    name: str
    weights: str
    format: ChatFormat
    recipe: Recipe | None = None


def read_names(references: Sequence[str]) -> dict[str, str]:
    """Students by name, of `NAME=PATH` or of a path that names itself.

    A folder `train` goes by the name of the run around it.
    """
    found = dict[str, str]()
    for given in references:
        path = Path(given).expanduser().absolute()
        folder = path.parent if path.name == "train" else path
        match = _NAMED.fullmatch(given)
        own = given if given.startswith(SCHEME) else folder.name
        name, reference = (match[1], match[2]) if match else (own, given)
        if name in found:
            raise SettingsError(f"Two students are called {name!r}: name one, NAME=PATH.")
        found[name] = reference
    return found


def _open_student(
    service: Service, name: str, reference: str, format: ChatFormat, recipe: Recipe | None
) -> tuple[Served, Recipe | None]:
    if reference.startswith(SCHEME):
        return Served(name, service.engine.weights_of(reference), format), recipe
    place = Path(reference).expanduser()
    if (place / "adapter_config.json").is_file():
        return Served(name, service.engine.weights_in(place), format), recipe
    folder = find_training(place)
    if folder is None:
        raise ModelError(
            f"{reference!r} is no student: expected a training's folder, a PEFT adapter's, or "
            "tinker://<run>/sampler_weights/<name> of the server's --store."
        )
    config, checkpoint = read_training(folder)
    try:
        weights = service.engine.weights_of(checkpoint["sampler"], Store(folder / "checkpoints"))
    except MissingError as error:
        raise ModelError(
            f"The checkpoint of {reference!r} is not in its folder: {error}. A student that was "
            "trained on a hosted server is served there."
        ) from error
    own = replace(format, name=config["renderer"])
    return Served(name, weights, own), _recipe_of(config) or recipe


def _recipe_of(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe in the release that a student was trained on, if it is here with its prompt."""
    path = Path(str(config.get("dataset", {}).get("path", ""))).expanduser()
    try:
        chosen = config.get("settings", {}).get("config")
        release = find_release(path, ("recipe",), chosen) if path.exists() else None
    except DatasetError:
        return None  # it was changed since: its prompt may be another one
    if release is None or not (release.path / "recipe" / "prompt.md").is_file():
        return None
    return load_recipe(release.path / "recipe", trust=True)


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
_MEANINGS: Sequence[tuple[type[Exception], int, str, str | None]] = (
    (MissingError, 404, INVALID, "model_not_found"),
    (RetryableError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (ServiceError, 500, "server_error", None),
    (DistillError, 400, INVALID, None),
)


def _explained(error: Exception) -> web.Response:
    for kind, status, name, code in _MEANINGS:
        if isinstance(error, kind):
            return refused(status, str(error), kind=name, code=code)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return refused(413, f"expected at most {LARGEST_BODY} bytes in a request; found more")
    if isinstance(error, web.HTTPException):  # a path or a method that is not here
        return refused(error.status, f"this server has no such endpoint: {error.reason}")
    return refused(400, f"the request can't be read: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Completion:
    """One answer in the making: its requests with their prompts, and how they are read and
    written.
    """

    writer: BodyWriter
    requests: Sequence[LiveRequest]
    prompts: Sequence[Sequence[int]]

    async def whole(self, *, echo: bool = False, only_echo: bool = False) -> web.Response:
        """The answer in one body; with `echo` each choice behind its prompt, or that alone."""
        outcomes = [await one.outcome() for one in self.requests]
        choices: list[dict[str, Any]] = []
        for prompt, outcome in zip(self.prompts, outcomes, strict=True):
            if only_echo:
                outcome.samples[:] = [DrawnSample([], [], [], False)] * self.writer.asked.n
            for sample in outcome.samples:
                said = self.writer.reader.read(sample.tokens)
                choice = self.writer.choice(len(choices), said, sample)
                choice = self.writer.echo(choice, prompt, outcome, sample) if echo else choice
                choices.append(choice)
        body = {**self.writer.body(choices), "usage": usage(self.prompts, outcomes)}
        return web.json_response(body)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The answer in events; what fails before the first is a plain refusal."""
        stream, outcomes, asked = _Events(request, self.writer), list[Outcome](), self.writer.asked
        try:
            for first, live in zip(count(0, asked.n), self.requests):
                outcomes.append(await self._stream_one(first, live, stream))
            if asked.usage:
                await stream.send([], usage=usage(self.prompts, outcomes))
            await stream.write("[DONE]")
        except DistillError as error:
            if not stream.begun:
                raise
            with suppress(ConnectionResetError):
                body = error_body(str(error), kind="server_error")
                await stream.write(json.dumps({"error": body}))
        except ConnectionResetError:  # the client went away
            pass
        return stream.response

    async def _stream_one(self, first: int, live: LiveRequest, stream: _Events) -> Outcome:
        """Send what one request draws, its samples numbered from `first`."""
        choices = [Choice(self.writer.reader) for _ in range(self.writer.asked.n)]
        while drawn := await live.drawn():
            for sample in {sample for sample, *_ in drawn}:
                choice = choices[sample]
                choice.add([(token, logprob) for of, token, logprob in drawn if of == sample])
                if text := choice.news():
                    await stream.send([self.writer.delta(first + sample, choice, text)])
        outcome = await live.outcome()
        ended = zip(count(first), choices, outcome.samples, strict=False)
        for index, choice, whole in ended:
            said = self.writer.reader.read(whole.tokens)
            rest = choice.rest(said.content, self.writer.reader.plain(whole.tokens))
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
            first = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            await self.send([{"index": index, **first, "logprobs": None} for index in news])
        told: dict[str, Any] = {"usage": None} if self._writer.asked.usage else {}
        await self.write(json.dumps(self._writer.body(choices, chunk=True) | told | extra))

    async def write(self, data: str) -> None:
        """Send an event."""
        if not self.begun:
            self.begun = True
            await self.response.prepare(self._request)
        await self.response.write(f"data: {data}\n\n".encode())


class _Endpoints:
    def __init__(self, service: Service, models: Mapping[str, Served]) -> None:
        self._service, self._models, self._waiting = service, models, 0
        self._created = int(time.time())

    def _find(self, name: str) -> Served:
        """A model; raises `MissingError` that says which there are.

        A checkpoint of the store goes by its path too.
        """
        if name in self._models:
            return self._models[name]
        if name.startswith(SCHEME):
            base = self._models[self._service.card.name]
            return Served(name, self._service.engine.weights_of(name), base.format)
        known = list(self._models)[:20]
        raise MissingError(f"found no model {name[:200]!r}; this server has {known}")

    async def list_models(self, _: web.Request) -> web.Response:
        found = [self._told(one) for one in self._models.values()]
        return web.json_response({"object": "list", "data": found})

    async def get_model(self, request: web.Request) -> web.Response:
        return web.json_response(self._told(self._find(request.match_info["name"])))

    def _told(self, model: Served) -> dict[str, Any]:
        base = self._service.card.name
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "local",
            "root": base,
            "parent": None if model.name == base else base,
            "max_model_len": self._service.card.max_context,
        }

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = read_chat(read_json(await request.read()))
        model = self._find(asked.model)
        messages, tools = asked.messages, asked.tools
        if model.recipe is not None:
            messages, tools = with_prompt(model.recipe, messages, tools)
        tokens = model.format.prompts.tokens(messages, tools)
        thinks = str(model.format.tokenizer.decode(tokens[-4:])).rstrip().endswith("<think>")
        if asked.calls and thinks:
            raise InvalidRequestError(
                "expected tool_choice of 'auto' or 'none': this model thinks before it calls a tool"
            )
        if asked.calls:
            tokens = [*tokens, *model.format.call_opening]
        constrain = None
        if asked.schema is not None:
            constrain = await self._service.hold(asked.schema, model.format.ends)
        sampled = _sampled(model, asked, tokens, (*asked.stop, *model.format.end_texts))
        reader = ChatReader(model.format, asked, tools, thinks)
        writer = BodyWriter(reader, self._service.card.fingerprint)
        with self._admitted():
            live = LiveRequest(self._service, model.weights, sampled, request, asked, constrain)
            answer = _Completion(writer, [live], [tokens])
            return await (answer.stream(request) if asked.stream else answer.whole())

    async def text(self, request: web.Request) -> web.StreamResponse:
        asked = read_text(read_json(await request.read()))
        model = self._find(asked.model)
        if model.recipe is not None:
            raise InvalidRequestError(
                f"{model.name!r} puts its prompt before a conversation: ask chat/completions"
            )
        encode = model.format.tokenizer.encode
        prompts = [encode(one) if isinstance(one, str) else one for one in asked.prompts]
        scored: dict[str, Any] = {}
        if asked.echo and asked.top is not None:
            scored = {"prompt_logprobs": True, "topk_prompt_logprobs": asked.top}
        sampled = [_sampled(model, asked, tokens, asked.stop, **scored) for tokens in prompts]
        writer = BodyWriter(TextReader(model.format, asked), self._service.card.fingerprint)
        with self._admitted():
            service, weights = self._service, model.weights
            live = [LiveRequest(service, weights, one, request, asked) for one in sampled]
            answer = _Completion(writer, live, prompts)
            if asked.stream:
                return await answer.stream(request)
            return await answer.whole(echo=asked.echo, only_echo=asked.only_echo)

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
