"""Every server that speaks OpenAI's `/chat/completions`: OpenAI, vLLM, SGLang and many more."""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from http.client import HTTPException
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, getproxies, proxy_bypass, urlopen

import aiohttp
from yarl import URL

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.openai.errors import (
    Refusal,
    explain,
    read_allowance,
    read_refusal,
)
from distill_datasets.models.openai.stream import read_stream
from distill_datasets.models.openai.wire import parse, read_reply, write_body
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.models.openai.batches import OpenAIBatches

_OPENAI = "https://api.openai.com/v1"
_JSON = {"Content-Type": "application/json"}
_NEWER = "max_completion_tokens"
_PATIENCE = 20.0  # seconds to reach a server

_Session = tuple[aiohttp.ClientSession, AsyncGenerator[aiohttp.ClientSession]]


class OpenAISampler:
    """Samples from a model behind an OpenAI-compatible address; one request, `Sampling.n` samples.

    `base_url` and `api_key` default to OPENAI_BASE_URL and OPENAI_API_KEY. `timeout` is in
    seconds, for a whole answer. With `stream` a reply says when its first token came, for about
    0.01 ms of processor time a token. One that is opened `lazily` looks for the key and the server
    before its first request, and not at all where there is none.
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
        self.url = _address(base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI)
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._lacks_key = not key and not _is_near(self.url.host or "")
        self._reached = not lazily
        self._reaching: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        if not lazily:
            self._check_key()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=_PATIENCE)
        self._chat = self.url / "chat/completions"
        # OpenAI's newer models know no other name; elsewhere it is the newer one.
        self._length_key = _NEWER if self._is_openai else "max_tokens"
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._identity = self._identify()

    @property
    def model(self) -> str:
        """The reference, `openai:<model>`."""
        return f"openai:{self.name}"

    @property
    def identity(self) -> str:
        """The reference, and the address unless it is OpenAI's: names mean nothing elsewhere."""
        return self._identity

    def _identify(self) -> str:
        if self._is_openai:
            return self.model
        path = self.url.path.rstrip("/").removesuffix("/v1")
        return f"{self.model}@{self.url.host_port_subcomponent}{path}"

    @property
    def _is_openai(self) -> bool:
        return self.url.host == URL(_OPENAI).host

    @property
    def batches(self) -> "OpenAIBatches":
        """The batches of this endpoint, if it has any."""
        from distill_datasets.models.openai.batches import OpenAIBatches

        return OpenAIBatches(self)

    def body(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        length_key: str | None = None,
        stream: bool = False,
    ) -> bytes:
        """A request as it is sent."""
        key = length_key or self._length_key
        return write_body(self.name, messages, sampling, length_key=key, stream=stream)

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. Tokens of several samples are shared out: only their sum is the server's."""
        if not self._reached:
            await self._reach_once()
        key = self._length_key
        answer = await self._post(messages, sampling, key)
        if isinstance(answer, Refusal) and key != _NEWER and answer.wants_completion_tokens:
            self._length_key = _NEWER
            answer = await self._post(messages, sampling, _NEWER)
        if isinstance(answer, Reply):
            return answer
        raise await self.explained(answer)

    async def explained(self, refusal: Refusal) -> DistillError:
        """The error that a refusal is, with the names that an unknown model may have meant."""
        if not refusal.names_no_model:
            return explain(refusal, self.model)
        names = await self._models()
        near = get_close_matches(self.name, names, n=3, cutoff=0.3) or names[:3]
        known = f" Near names: {near}; it has {len(names)}." if names else ""
        return ModelError(
            f"{self.url} knows no {self.name!r} ({refusal.message}).{known} Check the name, and "
            "that OPENAI_BASE_URL is the address of its API, often ending in /v1."
        )

    def reach(self) -> None:
        """See that the server is there and takes the key: one request that costs nothing.

        Raises `ServiceError` or `AccessError`. A server that has no list of models is there too.
        """
        self._check_key()
        asked = Request(str(self.url / "models"))
        for name, value in self._headers.items():
            asked.add_unredirected_header(name, value)  # the key is for this address alone
        try:
            with urlopen(asked, timeout=_PATIENCE):
                pass
        except HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            if error.code in (401, 403):
                raise explain(read_refusal(error.code, {}, text), self.model) from error
        except (OSError, HTTPException) as error:
            raise ServiceError(
                f"Can't reach {self.url} for {self.model!r}: {error}. Start the server, or check "
                "the network and OPENAI_BASE_URL."
            ) from error

    async def _reach_once(self) -> None:
        """Everyone waits for one look at the server, and hears what came of it."""
        loop = asyncio.get_running_loop()
        if loop not in self._reaching:
            self._reaching[loop] = loop.create_task(asyncio.to_thread(self.reach))
        await asyncio.shield(self._reaching[loop])
        self._reached = True
        self._reaching.pop(loop, None)

    def _check_key(self) -> None:
        if self._lacks_key:
            raise AccessError(
                f"{self.name!r} at {self.url} needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL "
                "for a server of your own (one on this machine or network needs no key)."
            )

    async def _post(
        self, messages: Sequence[Message], sampling: Sampling, length_key: str
    ) -> Reply | Refusal:
        body = self.body(messages, sampling, length_key=length_key, stream=self.stream)
        first, start = None, time.monotonic()
        found: bytes | dict[str, Any]
        with self.errors_explained():
            session = await self.session()
            async with session.post(
                self._chat, data=body, headers=_JSON, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                if status == 200 and self.stream:
                    found, arrived = await read_stream(response.content)
                    first = arrived and arrived - start
                else:
                    found = await response.read()
        answer = parse(found) if isinstance(found, bytes) and status == 200 else found
        if isinstance(answer, bytes):
            return read_refusal(status, headers, answer.decode(errors="replace"))
        if answer.get("error") and not answer.get("choices"):
            return read_refusal(status, headers, json.dumps(answer))
        reply = read_reply(answer, sampling, first)
        allowance = read_allowance(headers)
        return reply if allowance is None else replace(reply, allowance=allowance)

    @contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turns what can go wrong on the way into errors that tell whether to ask again."""
        try:
            yield
        except DistillError:
            raise  # some of ours are OSErrors too
        except TimeoutError as error:
            said = str(error) or f"No whole answer within {self._timeout.total} s"
            raise RetryableError(said, type="time-out") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}", type="connection") from error

    async def _models(self) -> list[str]:
        try:
            session = await self.session()
            async with session.get(self.url / "models") as response:
                return sorted(model["id"] for model in (await response.json())["data"])
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):
            return []  # the names are a help in an error's text, and no more

    async def session(self) -> aiohttp.ClientSession:
        """This event loop's session: it ends with `close`, or when the loop is shut down."""
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            opened = self._open(loop)
            self._sessions[loop] = await anext(opened), opened
        return self._sessions[loop][0]

    async def _open(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[aiohttp.ClientSession]:
        # A loop that shuts down its asynchronous generators, as `asyncio.run` does, ends this.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=_proxy(self.url),
        ) as session:
            try:
                yield session
            finally:
                del self._sessions[loop]

    async def close(self) -> None:
        """Release the connections of this event loop; the next request opens new ones."""
        if found := self._sessions.get(asyncio.get_running_loop()):
            await found[1].aclose()


def _address(text: str) -> URL:
    try:
        url = URL(text.rstrip("/").removesuffix("/chat/completions"))
    except ValueError as error:
        raise ModelError(f"OPENAI_BASE_URL: {text!r} is no address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host or url.user or url.password:
        found = str(url.with_user(None)) if url.host else text
        raise ModelError(
            f"OPENAI_BASE_URL: expected https://host/v1 or the like, and the key in "
            f"OPENAI_API_KEY, found {found!r}."
        )
    return url


def _is_near(host: str) -> bool:
    """Whether it is this machine or its network, whose servers are often open to all."""
    try:
        return ip_address(host).is_private  # loopback and link-local addresses are too
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _proxy(url: URL) -> str | None:
    # Read here once: with `trust_env` the client looks into a file for every request.
    if proxy_bypass(url.host or ""):
        return None
    return getproxies().get(url.scheme)
