"""Every server that speaks OpenAI's `/chat/completions`: OpenAI, vLLM, SGLang and many more.

Where a server has them, its files and batches too: many requests in one file, answered within a
day at half price.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RetryableError,
)
from distill_datasets.models.endpoint import (
    MOST_BYTES,
    Endpoint,
    read_address,
    read_answer,
    read_key,
    too_large,
)
from distill_datasets.models.openai_wire import (
    bad_answer,
    parse,
    read_reply,
    read_stream,
    write_body,
)
from distill_datasets.models.retry import Refusal, explain, read_allowance, read_refusal
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message

_OPENAI = "https://api.openai.com/v1"
_JSON = {"Content-Type": "application/json"}
_NEWER = "max_completion_tokens"
_OVER = {"completed", "expired", "cancelled", "failed"}
_KEY = "distill_datasets"  # of the metadata in which our own name of a batch travels
_PAGE = 100
_NAME = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{64})"')
# Files are large: no limit but on silence.
_ANSWER = aiohttp.ClientTimeout(total=600, sock_connect=20)
_SILENCE = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=120)


@dataclass(frozen=True)
class BatchJob:
    """A batch that is planned, sent or being worked on.

    `key` is ours, and travels with it; `file` and `name` are the provider's, None before it gave
    them. `sent` says that the provider was asked to start it, whether or not it answered.
    """

    key: str
    identity: str
    sampling: Sampling
    requests: int
    file: str | None = None
    sent: bool = False
    name: str | None = None


@dataclass(frozen=True)
class BatchState:
    """How far a batch is at the provider.

    `files` hold what it answered, whole once it is `over`; `problem` is why it failed, and
    `too_much` says that it did because too much was waiting already.
    """

    status: str
    over: bool
    done: int
    files: tuple[str, ...]
    problem: str
    too_much: bool


class OpenAIBatches:
    """The batches of an endpoint; the calls here cost nothing but `create`.

    `length_key` is the server's name for `Sampling.max_tokens`.
    """

    most_requests = 50_000
    most_bytes = 200_000_000

    def __init__(self, endpoint: Endpoint, model: str, length_key: str) -> None:
        """Through the sampler's own connections."""
        self.endpoint, self.model, self.length_key = endpoint, model, length_key

    def line(self, digest: str, messages: Sequence[Message], sampling: Sampling) -> bytes:
        """One request of a batch's file."""
        body = write_body(self.model, messages, sampling, length_key=self.length_key)
        head = f'{{"custom_id":"{digest}","method":"POST","url":"/v1/chat/completions","body":'
        return head.encode() + body + b"}\n"

    async def upload(self, path: Path) -> str:
        """Send a file of requests; the provider's name for it."""
        with path.open("rb") as file:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", file, filename=path.name, content_type="application/jsonl")
            return _named(await self._json("POST", "files", data=form, timeout=_SILENCE))

    async def create(self, file: str, key: str) -> str:
        """Have a file worked on, which costs; the provider's name for the batch."""
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {_KEY: key},
        }
        headers = {"Idempotency-Key": key}
        return _named(await self._json("POST", "batches", json=body, headers=headers))

    async def find(self, key: str) -> str | None:
        """The provider's name for a batch of ours, if it ever heard of it."""
        after: dict[str, str] = {}
        while True:
            page = await self._json("GET", "batches", params={"limit": str(_PAGE), **after})
            batches = page.get("data") or []
            for batch in batches:
                if (batch.get("metadata") or {}).get(_KEY) == key:
                    return _named(batch)
            if not page.get("has_more") or not batches:
                return None
            after = {"after": _named(batches[-1])}

    async def look(self, name: str) -> BatchState:
        """How far a batch is."""
        batch = await self._json("GET", f"batches/{name}")
        counts = batch.get("request_counts") or {}
        problems = (batch.get("errors") or {}).get("data") or []
        return BatchState(
            status=str(batch.get("status")),
            over=batch.get("status") in _OVER,
            done=(counts.get("completed") or 0) + (counts.get("failed") or 0),
            files=tuple(
                str(batch[kind]) for kind in ("output_file_id", "error_file_id") if batch.get(kind)
            ),
            problem="; ".join(str(problem.get("message")) for problem in problems),
            too_much=any(problem.get("code") == "token_limit_exceeded" for problem in problems),
        )

    async def lines(self, file: str) -> AsyncIterator[bytes]:
        """What a batch answered, a request a line, in no order.

        Raises `RejectedError` where the provider has deleted it.
        """
        session, rest = await self.endpoint.session(), b""
        url = self.endpoint.at(f"files/{file}/content")
        with self.endpoint.explained():
            async with session.get(url, timeout=_SILENCE) as response:
                if response.status == 404:
                    raise RejectedError(f"{file} is gone", type="bad request", status=404)
                if response.status != 200:
                    raise await self._refused(response, file)
                async for piece in response.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    rest = rest[: MOST_BYTES + 1]  # `read` says that it is too large
                    for line in filter(bytes.strip, lines):
                        yield line
        if rest.strip():
            yield rest

    def read(self, line: bytes, sampling: Sampling) -> tuple[str | None, Reply | DistillError]:
        """A request's digest and what became of it; no digest where the line names none."""
        name = _NAME.search(line)
        digest = name[1].decode() if name else None
        try:
            if len(line) > MOST_BYTES:
                raise too_large()
            row = parse(line)
            named = row.get("custom_id")
            digest = named if isinstance(named, str) else None
            reply = self._read(row.get("response"), row.get("error"), sampling)
        except DistillError as failure:
            return digest, self.endpoint.hidden(self.endpoint.standing.judge_now(failure))
        self.endpoint.standing.accept()
        return digest, reply

    def _read(self, answer: Any, error: Any, sampling: Sampling) -> Reply:
        status = str(answer.get("status_code")) if isinstance(answer, dict) else ""
        if not status.isdigit():
            said = error if isinstance(error, dict) else {}
            raise RetryableError(
                str(said.get("message") or "no answer"), type=str(said.get("code") or "bad answer")
            )
        body = answer.get("body")
        if status != "200" or not isinstance(body, dict) or "choices" not in body:
            raise explain(read_refusal(int(status), {}, json.dumps(body)), self.model)
        return read_reply(body, sampling)

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        session, options = await self.endpoint.session(), {"timeout": _ANSWER, **options}
        with self.endpoint.explained():
            async with session.request(method, self.endpoint.at(path), **options) as response:
                if response.status == 200:
                    return parse(await read_answer(response))
                refused = await self._refused(response, f"openai:{self.model}")
        if response.status == 404 and "/" in path:
            raise AccessError(
                f"{self.endpoint} knows no {path}: use the key and the OPENAI_BASE_URL with which "
                "it was sent."
            )
        if response.status in (404, 405):
            raise ModelError(
                f"{self.endpoint} has no {path}, so nothing can be asked in batches there. Run "
                "without --batch."
            )
        raise refused

    async def _refused(self, response: aiohttp.ClientResponse, reference: str) -> DistillError:
        text = (await read_answer(response)).decode(errors="replace")
        text = self.endpoint.hide(text)
        return explain(read_refusal(response.status, response.headers, text), reference)


def _named(answer: Mapping[str, Any]) -> str:
    """The name of what was just made."""
    if not isinstance(name := answer.get("id"), str):
        raise bad_answer(f"no id in {json.dumps(answer)[:200]}")
    return name


class OpenAISampler:
    """Samples from a model behind an OpenAI-compatible address; one request, `Sampling.n` samples.

    `base_url` and `api_key` default to OPENAI_BASE_URL and OPENAI_API_KEY. `timeout` is in
    seconds, for a whole answer; setting `endpoint.timeout` changes that of later requests. With
    `stream` a reply says when its first token came, for about 0.01 ms of processor time a token.
    One that is opened `lazily` looks for the key and the server before its first request, and not
    at all where there is none.
    """

    def __init__(  # noqa: PLR0913 (an address, and how to ask there)
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        stream: bool = False,
        lazily: bool = False,
    ) -> None:
        """Asks nobody yet; raises `AccessError` without the key that the address needs."""
        self.name, self.stream = model, stream
        address = base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI
        key = read_key(api_key or os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY")
        url = _base(read_address(address, "OPENAI_BASE_URL"))
        self.endpoint = Endpoint(url, key, "OPENAI_BASE_URL", timeout)
        self._completions = self.endpoint.at("chat/completions")
        self._is_openai = url.host == URL(_OPENAI).host
        self._reached = not lazily
        self._reaching: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        if not lazily:
            self._check_key()
        # OpenAI's newer models know no other name; elsewhere it is the newer one.
        self._length_key = _NEWER if self._is_openai else "max_tokens"

    @property
    def model(self) -> str:
        """The reference, `openai:<model>`."""
        return f"openai:{self.name}"

    @cached_property
    def identity(self) -> str:
        """The reference, and the address unless it is OpenAI's: names mean nothing elsewhere."""
        if self._is_openai:
            return self.model
        url = self.endpoint.url
        path = url.path.rstrip("/").removesuffix("/v1")
        return f"{self.model}@{url.host_port_subcomponent}{path}"

    @property
    def batches(self) -> OpenAIBatches:
        """The batches of this endpoint, if it has any."""
        return OpenAIBatches(self.endpoint, self.name, self._length_key)

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. Tokens of several samples are shared out: only their sum is the server's."""
        if not self._reached:
            await self._reach_once()
        try:
            with self.endpoint.standing.request():
                reply = await self._ask(messages, sampling)
        except DistillError as error:
            judged = await self.endpoint.standing.judge(error)
            raise self.endpoint.hidden(judged) from error.__cause__
        self.endpoint.standing.accept()
        return reply

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        key = self._length_key
        answer = await self._post(messages, sampling, key)
        if isinstance(answer, Refusal) and key != _NEWER and answer.wants_completion_tokens:
            self._length_key = _NEWER
            answer = await self._post(messages, sampling, _NEWER)
        if isinstance(answer, Refusal):
            raise await self._explained(answer)
        return answer

    async def _post(
        self, messages: Sequence[Message], sampling: Sampling, length_key: str
    ) -> Reply | Refusal:
        body = write_body(self.name, messages, sampling, length_key=length_key, stream=self.stream)
        first, start = None, time.monotonic()
        with self.endpoint.explained():
            session = await self.endpoint.session()
            async with session.post(
                self._completions,
                data=body,
                headers=_JSON,
                allow_redirects=False,
                timeout=self.endpoint.client_timeout,
            ) as response:
                status, headers = response.status, response.headers
                if status == 200 and self.stream and response.content_type != "application/json":
                    answer, arrived = await read_stream(response.content)
                    first = arrived and arrived - start
                else:
                    whole = await read_answer(response)
                    if status != 200:
                        return read_refusal(status, headers, whole.decode(errors="replace"))
                    answer = parse(whole)
        if answer.get("error") and not answer.get("choices"):
            return read_refusal(status, headers, json.dumps(answer))
        return read_reply(answer, sampling, first, read_allowance(headers))

    async def _explained(self, refusal: Refusal) -> DistillError:
        """The error that a refusal is, with the names that an unknown model may have meant."""
        if self.endpoint.standing.answered or not refusal.names_no_model:
            return explain(refusal, self.model)
        names = await self._models()
        near = get_close_matches(self.name, names, n=3, cutoff=0.3) or names[:3]
        known = f" Near names: {near}; it has {len(names)}." if names else ""
        return ModelError(
            f"{self.endpoint} knows no {self.name!r} ({refusal.message}).{known} Check the name, "
            "and that OPENAI_BASE_URL is the address of its API, often ending in /v1."
        )

    async def _models(self) -> list[str]:
        try:
            session, timeout = await self.endpoint.session(), aiohttp.ClientTimeout(total=20)
            async with session.get(self.endpoint.at("models"), timeout=timeout) as response:
                listed = parse(await read_answer(response))["data"]
                return sorted(str(model["id"]) for model in listed)
        except (aiohttp.ClientError, DistillError, OSError, KeyError, TypeError):
            return []  # the names are a help in an error's text, and no more

    def reach(self) -> None:
        """See that the server is there and takes the key: one request that costs nothing.

        Raises `ServiceError` or `AccessError`. A server that has no list of models is there too.
        """
        self._check_key()
        status, text = self.endpoint.look("models", self.model)
        if status in (401, 403):
            raise explain(read_refusal(status, {}, self.endpoint.hide(text)), self.model)

    async def _reach_once(self) -> None:
        """Everyone waits for one look at the server, and is told what came of it."""
        loop = asyncio.get_running_loop()
        if loop not in self._reaching:
            self._reaching[loop] = loop.create_task(asyncio.to_thread(self.reach))
        await asyncio.shield(self._reaching[loop])
        self._reached = True
        self._reaching.pop(loop, None)

    def _check_key(self) -> None:
        if not self.endpoint.key and not _is_near(self.endpoint.url.host or ""):
            raise AccessError(
                f"{self.name!r} at {self.endpoint} needs a key: set OPENAI_API_KEY, or "
                "OPENAI_BASE_URL for a server of your own (one on this machine or network needs "
                "no key)."
            )

    async def close(self) -> None:
        """Release the connections of this event loop; the next request opens new ones."""
        await self.endpoint.close()


def _base(url: URL) -> URL:
    """An address without a trailing slash, and without the path that is asked there."""
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.with_path(path, keep_query=True)


def _is_near(host: str) -> bool:
    """Whether it is this machine or its network, whose servers are often open to all."""
    try:
        return ip_address(host).is_private  # loopback and link-local addresses are too
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))
