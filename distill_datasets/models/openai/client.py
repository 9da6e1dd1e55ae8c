"""Every server that speaks OpenAI's `/chat/completions`: OpenAI, vLLM, SGLang and many more."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from ipaddress import ip_address

import aiohttp
from yarl import URL

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
)
from distill_datasets.models.endpoint import (
    Endpoint,
    read_address,
    read_answer,
    read_key,
)
from distill_datasets.models.openai.batches import OpenAIBatches
from distill_datasets.models.openai.errors import Refusal, explain, read_allowance, read_refusal
from distill_datasets.models.openai.wire import parse, read_reply, read_stream, write_body
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message

_OPENAI = "https://api.openai.com/v1"
_JSON = {"Content-Type": "application/json"}
_NEWER = "max_completion_tokens"


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
            judged.args = (self.endpoint.hide(str(judged)),)
            raise judged from error.__cause__
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
        reply = read_reply(answer, sampling, first)
        allowance = read_allowance(headers)
        return reply if allowance is None else replace(reply, allowance=allowance)

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
