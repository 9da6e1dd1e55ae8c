"""Tinker, and every server of its protocol, such as the one in embedded/: sampling, by the SDK.

Its hosted service, waiting for what it is asked, and its errors as sentences stand here too.

A server of its protocol may lack what only keeps house (`optional`); what training can't do
without is looked for before it begins (`require_endpoints`).
"""

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType
from tinker.lib.internal_client_holder import _internal_client_holder_thread_singleton

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.endpoint import Endpoint, read_address, read_key
from distill_datasets.models.retry import Standing, read_retry_after
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.embedded.process import Server
    from distill_datasets.models.renderers import Prompts, TextRenderer


# The SDK's transport imports this from its threads at its first failure, where the import lock of
# CPython 3.11 can break.
with suppress(ImportError):
    import pyqwest._errors  # noqa: F401


NOT_STATED = "what the server has, and what it can do with it, is not checked"
GLANCE = 2.0  # seconds between looks at whether a server of this machine still runs
TRAINING = (  # what a server needs before a student can be trained there
    "create_model",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "load_weights",
    "create_sampling_session",
    "asample",
    "retrieve_future",
)
_HOSTED = "https://tinker.thinkingmachines.dev"
_FATAL = (
    tinker.AuthenticationError,
    tinker.PermissionDeniedError,
    tinker.BillingError,
    tinker.NotFoundError,
)
_KEY, _ADDRESS = "TINKER_API_KEY", "TINKER_BASE_URL"
_NO_ROUTE = ("", "not found", "detail not found", "error not found", "message not found")
_MOST_SAID = 500  # characters of a server's answer that a message shows
_ASKING = 20.0  # seconds for a request that a server answers at once
_ENDING = 5.0  # seconds at exit for what is on its way
_SETTLED = 5  # looks in a row that find no thread of the transport at work
_TOLD: set[str] = set()


@dataclass(frozen=True)
class Connection:
    """A model on a server: what is needed to render for it, sample from it and train it.

    `base_model` is the server's name for it, `model_path` a trained checkpoint of it.
    `tokenizer_source` is where its tokenizer is loaded from; `weights` tells two local models of
    one name apart; `server` is the one that was started for a local model.
    """

    reference: str
    service: tinker.ServiceClient
    base_model: str
    tokenizer_source: str
    renderer_name: str
    max_context: int | None = None
    model_path: str | None = None
    weights: str = ""
    server: "Server | None" = None

    @property
    def identity(self) -> str:
        """What decides an answer, stable across processes."""
        parts = (self.reference, self.weights, self.model_path, self.renderer_name)
        return "/".join(filter(None, parts))

    @cached_property
    def rest(self) -> tinker.RestClient:
        """What the server says about runs and checkpoints; no session needed."""
        if self.server is None:
            return rest_client(self.reference)
        return tinker.RestClient(base_url=self.server.url, api_key=self.server.api_key)

    def open_session(self) -> Any:
        """A request for a session that samples from this model."""
        path = self.model_path
        base = None if path else self.base_model
        return self.service.create_sampling_client(model_path=path, base_model=base)

    def ended(self) -> ServiceError | None:
        """What to say when the server that was started for a local model runs no more.

        The SDK would try its address again for minutes.
        """
        if self.server is None or self.server.alive:
            return None
        return ServiceError(
            f"The server of {self.reference!r} ended, often for want of memory. What was saved is "
            f"kept: run it again to continue. Its last words: {self.server.stderr[-500:]!r}"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; code that comes with it is never run."""
        try:
            from distill_datasets.models.renderers import load_tokenizer

            return load_tokenizer(self.tokenizer_source)
        except Exception as error:  # libraries raise anything over files of others
            raise ModelError(
                f"The tokenizer of {self.reference!r} can't be loaded: {error} A gated one needs "
                "its licence accepted on the Hub and `hf auth login`; code that comes with a model "
                "is never run."
            ) from error

    @cached_property
    def renderer(self) -> "TextRenderer":
        """The renderer, by its name; raises `ModelError` where the model can't be rendered for."""
        from distill_datasets.models.renderers import open_renderer

        return open_renderer(self.renderer_name, self.tokenizer)


def hosted_key(reference: str) -> str:
    """The hosted service's key; raises `AccessError` where it could not be asked."""
    key = read_key(os.environ.get(_KEY), _KEY)
    if key is None:
        raise AccessError(
            f"{reference!r} needs a key: set {_KEY} (from the Tinker console), and {_ADDRESS} for "
            "another server. To try everything without a key, use 'pocket'."
        )
    if not key.startswith(("tml-", "eyJ")):
        raise AccessError(
            f"{_KEY}: expected a key that begins with 'tml-', found another. Copy it again from "
            "the Tinker console."
        )
    return key


def _address() -> str | None:
    address = os.environ.get(_ADDRESS)
    return str(read_address(address, _ADDRESS)) if address else None


def hosted_service(reference: str) -> tinker.ServiceClient:
    """A session of the hosted service, or of the server that TINKER_BASE_URL names."""
    return tinker.ServiceClient(base_url=_address(), api_key=hosted_key(reference))


def rest_client(reference: str) -> tinker.RestClient:
    """Named by address and key: left out, the SDK keeps one client for the whole process."""
    with explained(reference):
        return tinker.RestClient(base_url=_address(), api_key=hosted_key(reference))


def require_service(reference: str) -> None:
    """Raises `ServiceError` where nobody answers: a plain request knows at once what the SDK
    would find out in minutes.
    """
    Endpoint(read_address(_address() or _HOSTED, _ADDRESS), None, _ADDRESS).look("", reference)


def wait(request: Any, ended: Callable[[], ServiceError | None]) -> Any:
    """A request's result, or what `ended` says of its server.

    The SDK tries a dead address again for five minutes; a server of this machine that has ended
    is noticed within seconds.
    """
    result = request.future()
    while True:
        with suppress(FutureTimeout):
            return result.result(GLANCE)
        if result.done():
            return result.result()
        if error := ended():
            raise error


async def answered(request: Any, ended: Callable[[], ServiceError | None]) -> Any:
    """The same as `wait` on an event loop, for a `concurrent.futures.Future`."""
    waiting = asyncio.wrap_future(request)
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=GLANCE)
            if done:
                return waiting.result()
            if error := ended():
                raise error
    finally:
        waiting.cancel()


@contextmanager
def explained(reference: str) -> Iterator[None]:
    """Turns the SDK's refusals that no later call can cure into errors that say what to set.

    Each names the request that was refused.
    """
    try:
        yield
    except tinker.APIStatusError as error:
        if told := _refusal(reference, error):
            raise told from error
        raise
    except tinker.APIResponseValidationError as error:
        raise ServiceError(
            f"{reference!r}: the server answered outside Tinker's protocol: {_answer(error)}"
        ) from error
    except ValueError as error:
        # So the SDK says that the result of a request can't be had.
        if isinstance(error, DistillError) or not isinstance(error.__cause__, tinker.APIError):
            raise
        raise ServiceError(
            f"{reference!r}: the server lost a request: {_answer(error.__cause__)} Run it again."
        ) from error


def _refusal(reference: str, error: tinker.APIStatusError) -> ModelError | None:
    """What to say of a refusal that holds for every request; None for any other."""
    answer = _answer(error)
    if isinstance(error, tinker.AuthenticationError | tinker.PermissionDeniedError):
        return AccessError(f"{reference!r}: the server refused the key ({answer}). Check {_KEY}.")
    if isinstance(error, tinker.BillingError):
        return AccessError(f"{reference!r}: the account is out of credit ({answer}).")
    if _lacks(error):
        return ModelError(
            f"{reference!r}: the server has no endpoint {error.request.method} "
            f"{error.request.url.path}, which is needed here ({error.status_code}). Name another "
            f"server of Tinker's protocol in {_ADDRESS}, or a newer version of this one."
        )
    if isinstance(error, tinker.NotFoundError):
        return ModelError(f"{reference!r}: the server doesn't find what it was asked for: {answer}")
    return None


@contextmanager
def all_explained(reference: str, *, refused: str, kept: str) -> Iterator[None]:
    """Turns every error of the SDK into one of ours, for requests that nobody sends again.

    `refused` is what a server did that would not, `kept` what to do where it is gone.
    """
    try:
        with explained(reference):
            yield
    except (tinker.APIConnectionError, tinker.InternalServerError) as error:
        raise ServiceError(f"{reference!r}: the server is gone: {_answer(error)} {kept}") from error
    except tinker.APIStatusError as error:
        raise ModelError(f"{reference!r}: the server {refused}: {_answer(error)}") from error
    except tinker.RequestFailedError as error:
        raise ModelError(
            f"{reference!r}: the server {refused} (request {error.request_id}): {error}"
        ) from error


def _answer(error: tinker.APIError) -> str:
    """The request that failed, and what came back."""
    status, asked = getattr(error, "status_code", None), error.request
    said = f"{status}: {_said(error)}" if status else _said(error)
    return f"{asked.method} {asked.url.path}: {said}"


def _said(error: tinker.APIError) -> str:
    said: Any = error.body or str(error)
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
    return " ".join(str(said).split())[:_MOST_SAID]


def _lacks(error: tinker.APIStatusError) -> bool:
    """Whether the endpoint itself isn't there, by the status or by a router's own words."""
    if error.status_code in (405, 501):
        return True
    words = re.sub(r"[\W\d_]+", " ", str(error.body or "")).strip().lower()
    return error.status_code == 404 and (words in _NO_ROUTE or words.startswith("doctype html"))


def optional(request: Any, without: str) -> Any:
    """A request's result, or None where the server lacks the endpoint: `without` says what follows
    from that, once in a process.
    """
    try:
        return request.result()
    except tinker.APIStatusError as error:
        if not _lacks(error):
            raise
        _tell(without, _answer(error))
        return None


def try_to(request: Any, without: str, *, timeout: float) -> None:
    """Waits for a request that only keeps house: whatever the server refuses is told as `optional`
    tells it. A server that is gone is the SDK's error.
    """
    try:
        request.result(timeout)
    except FutureTimeout:
        _tell(without, f"nothing within {timeout:g} s")
    except tinker.APIStatusError as error:
        _tell(without, _answer(error))


def _tell(without: str, answer: str) -> None:
    if without not in _TOLD:
        _TOLD.add(without)
        print(f"note: {without}; the server answered {answer}", file=sys.stderr)


def ask(
    rest: tinker.RestClient,
    method: str,
    endpoint: str,
    body: Any = None,
    *,
    timeout: float | None = _ASKING,
) -> Any:
    """A request for an endpoint's answer as JSON, asked once; for what the SDK's types leave out.

    As the SDK's own requests it has `result`.
    """

    async def send() -> Any:
        with rest.holder.aclient(ClientConnectionPoolType.SESSION) as client:
            options: Any = {"max_retries": 0, "timeout": timeout}
            path = f"/api/v1/{endpoint}"
            if method == "GET":
                return await client.get(path, cast_to=object, options=options)
            return await client.post(path, body=body, cast_to=object, options=options)

    return rest.holder.run_coroutine_threadsafe(send())


async def hold_to_schema(
    client: tinker.SamplingClient,
    rest: tinker.RestClient,
    ended: Callable[[], ServiceError | None],
    schema: str,
    ends: Sequence[int],
) -> str | None:
    """Have the server of a local model hold a session's samples to a JSON schema (as text).

    None once it does, else why it can't. Tinker's protocol has no such thing.
    """
    endpoint = f"samplers/{client._sampling_session_id}/json_schema"
    body = {"json_schema": json.loads(schema), "ends": list(ends)}
    # It waits its turn behind what the server computes, which may be long.
    request = ask(rest, "POST", endpoint, body, timeout=None)
    try:
        await answered(request.future(), ended)
    except tinker.APIStatusError as error:
        return _said(error)
    return None


def require_endpoints(
    rest: tinker.RestClient, reference: str, endpoints: Sequence[str] = TRAINING
) -> None:
    """Raises `ModelError` that names the first endpoint which the server doesn't have.

    Each is asked with an empty request, which a server that has it refuses.
    """
    requests = [ask(rest, "POST", endpoint, {}).future() for endpoint in endpoints]
    for request in requests:
        error = request.exception()
        if isinstance(error, tinker.APIStatusError) and _lacks(error):
            with explained(reference):
                raise error


@contextmanager
def classified() -> Iterator[None]:
    """Tells requests that may succeed later from those that never will."""
    try:
        yield
    except tinker.RequestFailedError as error:
        if error.category == tinker.types.RequestErrorCategory.User:
            raise RejectedError(error.message, type=_kind(error.message)) from error
        raise RetryableError(error.message, type="server error") from error
    except (tinker.BadRequestError, tinker.UnprocessableEntityError) as error:
        raise RejectedError(str(error), type=_kind(str(error)), status=error.status_code) from error
    except tinker.APIStatusError as error:
        if isinstance(error, _FATAL) or _lacks(error):
            raise  # `explained` says what to set
        limited = isinstance(error, tinker.RateLimitError)
        kind = "rate limit" if limited else "server error"
        later = RetryableError(str(error), type=kind, status=error.status_code)
        later.retry_after = read_retry_after(error.response.headers)
        raise later from error
    except (tinker.APITimeoutError, TimeoutError) as error:
        raise RetryableError(str(error) or "no answer in time", type="time-out") from error
    except tinker.APIConnectionError as error:
        raise RetryableError(str(error), type="connection") from error


def _kind(message: str) -> str:
    return "context length" if "context" in message.lower() else "bad request"


def _end() -> None:
    """Ends what is on its way when Python ends.

    The transport answers on threads of its own. One that comes back while the interpreter is being
    taken down is thrown out of Python in the midst of Rust, which aborts the whole process.
    """
    background = _internal_client_holder_thread_singleton
    loop, thread = background.loop_if_started(), background._thread
    if loop is None or thread is None or not thread.is_alive():  # none in a forked child
        return
    with suppress(ValueError):  # another thread ends Python
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends already, within seconds
    end = time.monotonic() + _ENDING
    with suppress(FutureTimeout):
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(_ENDING)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(max(0.0, end - time.monotonic()))
    # A cancelled request still reports to Python once, and nothing says when it has.
    settled = 0
    while settled < _SETTLED and time.monotonic() < end:
        time.sleep(0.01)
        known = {one.ident for one in threading.enumerate()}
        settled = settled + 1 if known.issuperset(sys._current_frames()) else 0


async def _cancel_all() -> None:
    # What is cancelled may begin something else.
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# Before `atexit`: by then the executors are shut, on which the SDK's requests would fail aloud.
threading._register_atexit(_end)  # type: ignore[attr-defined]


class TinkerSampler:
    """Samples from a connection; one request asks for `Sampling.n` samples.

    `timeout` is in seconds, for a whole answer; a change holds for the requests after it.
    """

    def __init__(
        self,
        connection: Connection,
        client: tinker.SamplingClient | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Open a sampling session, or use one that is open; raises `ModelError` where the server
        refuses the model.
        """
        self.connection, self.timeout = connection, timeout
        self._standing = Standing()
        self._held: dict[str, asyncio.Future[tinker.SamplingClient]] = {}
        with explained(connection.reference):
            self.client: tinker.SamplingClient = client or connection.open_session().result()

    @property
    def model(self) -> str:
        """The reference, as written."""
        return self.connection.reference

    @property
    def identity(self) -> str:
        """Reference, weights, checkpoint and renderer."""
        return self.connection.identity

    @cached_property
    def _prompts(self) -> "Prompts":
        from distill_datasets.models.renderers import Prompts

        return Prompts(self.connection.renderer)

    @cached_property
    def _stop(self) -> Any:
        return self.connection.renderer.get_stop_sequences()

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. `Sampling.stop` cuts the text here: a server that isn't told of it samples,
        and is paid for, what is behind.
        """
        if sampling.extra is not None:
            raise ModelError(
                f"{self.model!r} takes no further settings: expected a recipe without "
                f"`sampling.extra`, found {sampling.extra}."
            )
        tokens = self._prompts.tokens(messages, sampling.tools)
        # Not validated: a thousand numbers that are known to be numbers.
        chunk = tinker.EncodedTextChunk.model_construct(tokens=tokens, type="encoded_text")
        prompt = tinker.ModelInput.model_construct(chunks=[chunk])
        try:
            with self._standing.request(), explained(self.model), classified():
                client = await self._client(sampling.json_schema)
                request = client.sample(
                    prompt,
                    sampling.n,
                    tinker.SamplingParams(
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                        seed=sampling.seed,
                        stop=self._stops(sampling.stop),
                    ),
                    topk_sample_logprobs=sampling.top_logprobs or 0,
                )
                async with asyncio.timeout(self.timeout):
                    response = await answered(request.future(), self.connection.ended)
        except (AccessError, ModelError) as error:
            raise await self._standing.judge(error) from error.__cause__
        self._standing.accept()
        samples = tuple(self._read(sequence, sampling) for sequence in response.sequences)
        return Reply(samples, Usage(len(tokens), response.prompt_cache_hit_tokens))

    async def _client(self, schema: str | None) -> tinker.SamplingClient:
        """The open session; of a local model one whose samples are held to the schema.

        Where its server can't hold them to it, what they are read by still tells.
        """
        ends = [one for one in self._stop if isinstance(one, int)]
        if schema is None or self.connection.server is None or not ends:
            return self.client
        held = self._held.get(schema)
        if held is None or (held.done() and (held.cancelled() or held.exception())):
            held = self._held[schema] = asyncio.ensure_future(self._hold(schema, ends))
        return await asyncio.shield(held)

    async def _hold(self, schema: str, ends: list[int]) -> tinker.SamplingClient:
        client: tinker.SamplingClient = await self.connection.open_session()
        refused = await hold_to_schema(
            client, self.connection.rest, self.connection.ended, schema, ends
        )
        if refused is None:
            return client
        warnings.warn(
            f"{self.model!r} is not held to the schema of its answers, which are read by it all "
            f"the same: {refused}",
            stacklevel=2,
        )
        return self.client

    def _stops(self, texts: tuple[str, ...]) -> Any:
        """Where a server ends a sample. The protocol takes texts or tokens, not both, and only the
        server of a local model is known to find a control token by its text.
        """
        whole = all(isinstance(one, str) for one in self._stop)
        if not texts or not (whole or self.connection.server is not None):
            return self._stop
        decode = self.connection.tokenizer.decode
        return [*texts, *(one if isinstance(one, str) else decode([one]) for one in self._stop)]

    def _read(self, sequence: Any, sampling: Sampling) -> Sample:
        text, reasoning = self.connection.renderer.read_response(
            sequence.tokens, tools=sampling.tools
        )
        ends = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
        cut_off = not ends and sequence.stop_reason == "length"
        return Sample(
            text[: min(ends)] if ends else text,
            "length" if cut_off else "stop",
            len(sequence.tokens),
            reasoning=reasoning,
            logprobs=None if sampling.top_logprobs is None else _logprobs(sequence),
        )


def _logprobs(sequence: Any) -> Logprobs:
    top = [row or [] for row in sequence.topk_logprobs or ()]
    return Logprobs(
        tuple(sequence.tokens),
        tuple(sequence.logprobs or ()),
        tuple(tuple(token for token, _ in row) for row in top),
        tuple(tuple(value for _, value in row) for row in top),
    )
