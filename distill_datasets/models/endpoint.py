"""Endpoints over HTTP: their addresses, keys and proxies, and what goes wrong on the way there."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.retry import Standing

MOST_BYTES = 16 << 20  # of one answer, unpacked
_CONNECT_SECONDS = 20.0
_QUOTES = frozenset("\"'`“”‘’„‚«»")
_LEAST_SECRET = 8  # characters: shorter keys, like "EMPTY", are words

_Session = tuple[aiohttp.ClientSession, AsyncGenerator[aiohttp.ClientSession]]


def read_key(text: str | None, variable: str) -> str | None:
    """A key without the blanks around it; None where there is none.

    Raises `AccessError`, which never shows the key, for quotes and whatever else no key has.
    """
    key = (text or "").strip()
    for place, sign in enumerate(key, start=1):
        if sign in _QUOTES or not "!" <= sign <= "~":
            kind = "a quotation mark" if sign in _QUOTES else "a blank or a sign beyond ASCII"
            raise AccessError(
                f"{variable}: expected a key, found {kind} at place {place} of {len(key)}. Copy "
                "the key again, without quotes."
            )
    return key or None


def read_address(text: str, variable: str) -> URL:
    """An address without the blanks around it; raises `ModelError` for what is none."""
    text = text.strip()
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        url, port = URL(), None
    odd = any(sign in _QUOTES or sign.isspace() for sign in text)
    if odd or url.scheme not in ("http", "https") or not url.host or not port or url.user:
        raise ModelError(
            f"{variable}: expected https://host/v1 or the like, without quotes and with the key "
            f"in a variable of its own, found {text.rpartition('@')[2].partition('?')[0]!r}."
        )
    return url


@dataclass(frozen=True)
class Proxy:
    """The proxy that the environment names for an address; `str` leaves its user out."""

    url: URL
    variable: str

    def __str__(self) -> str:
        return f"{self.url.with_user(None)} ({self.variable})"


def find_proxy(url: URL) -> Proxy | None:
    """The proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, unless NO_PROXY names the host.

    NO_PROXY may name networks, like 10.0.0.0/8. Raises `ServiceError` for a proxy that can't be
    used.
    """
    proxies = getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    text = proxies.get(kind, "").strip()
    if not text or _goes_straight(url, proxies.get("no", "")):
        return None
    found = None
    with suppress(ValueError):
        found = URL(text if "://" in text else f"http://{text}")
    if found is None or found.scheme not in ("http", "https") or not found.host:
        raise ServiceError(
            f"{kind.upper()}_PROXY: expected http://host:port, found "
            f"{text.rpartition('@')[2]!r}, which can't be used. Set another proxy, or name "
            f"{url.host} in NO_PROXY."
        )
    return Proxy(found, f"{kind.upper()}_PROXY")


def _goes_straight(url: URL, exceptions: str) -> bool:
    host = url.host or ""
    if proxy_bypass(f"{host}:{url.port}"):
        return True
    for entry in exceptions.split(","):
        with suppress(ValueError):
            if "/" in entry and ip_address(host) in ip_network(entry.strip(), strict=False):
                return True
    return False


@dataclass
class Endpoint:
    """An address, the key that goes there and nowhere else, and an HTTP session an event loop.

    `timeout` is in seconds, for a whole answer; a change holds for the requests after it.
    `variable` is where the user set the address.
    """

    url: URL
    key: str | None
    variable: str
    timeout: float = 600.0
    standing: Standing = field(default_factory=Standing)
    _sessions: dict[asyncio.AbstractEventLoop, _Session] = field(default_factory=dict)

    def at(self, path: str) -> URL:
        """The address of a path, with the query that the base address has."""
        return (self.url / path).with_query(self.url.query)

    def __str__(self) -> str:
        return str(self.url.with_query(None))  # a query may hold a key

    @property
    def headers(self) -> dict[str, str]:
        """The key, as it is sent."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def hide(self, text: str) -> str:
        """A text without the key, and without what else of the address is secret."""
        for secret in (self.key, *self.url.query.values()):
            if secret and len(secret) >= _LEAST_SECRET:
                text = text.replace(secret, "[hidden]")
        return text

    def hidden(self, error: DistillError) -> DistillError:
        """An error whose message has none of that."""
        error.args = (self.hide(str(error)),)
        return error

    def look(self, path: str, reference: str) -> tuple[int, str]:
        """The status and the beginning of what lies at a path, asked outside any event loop.

        Raises `ServiceError` where nobody answers, with the proxy's name where there is one.
        """
        import httpx

        proxy = find_proxy(self.url)
        try:
            with (
                httpx.Client(
                    proxy=str(proxy.url) if proxy else None,
                    trust_env=False,
                    verify=ssl.create_default_context(),
                    timeout=_CONNECT_SECONDS,
                    follow_redirects=True,  # the client leaves the key behind
                ) as client,
                client.stream("GET", str(self.at(path)), headers=self.headers) as answer,
            ):
                text = next(answer.iter_bytes(1 << 16), b"").decode(errors="replace")
                return answer.status_code, text
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = self.hide(str(error) or type(error).__name__)
            way = f" through the proxy {proxy}" if proxy else ""
            what = "Start the server, or check the network"
            if proxy:
                what = f"Check that proxy, name {self.url.host} in NO_PROXY, or check the network"
            raise ServiceError(
                f"Can't reach {self} for {reference!r}{way}: {said}. {what} and {self.variable}."
            ) from error

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what can go wrong on the way into errors that tell whether to ask again."""
        try:
            yield
        except DistillError:
            raise  # some of ours are OSErrors too
        except TimeoutError as error:
            said = str(error) or f"No whole answer within {self.timeout:g} s"
            raise RetryableError(said, type="time-out") from error
        except (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError) as error:
            said = f"The proxy {find_proxy(self.url)} gives no way to {self}: {error}"
            raise RetryableError(self.hide(said), type="connection") from error
        except (aiohttp.ClientError, OSError) as error:
            said = self.hide(f"{type(error).__name__}: {error}")
            raise RetryableError(said, type="connection") from error

    @property
    def client_timeout(self) -> aiohttp.ClientTimeout:
        """The time-out of a request that begins now."""
        return aiohttp.ClientTimeout(total=self.timeout, sock_connect=_CONNECT_SECONDS)

    async def session(self) -> aiohttp.ClientSession:
        """This event loop's session: it ends with `close`, or when the loop is shut down."""
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            opened = self._open(loop)
            self._sessions[loop] = await anext(opened), opened
        return self._sessions[loop][0]

    async def _open(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[aiohttp.ClientSession]:
        # The environment is read here once: with `trust_env` the client reads a file a request.
        proxy = find_proxy(self.url)
        # A loop that shuts down its asynchronous generators, as `asyncio.run` does, ends this.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=self.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=proxy.url if proxy else None,
        ) as session:
            try:
                yield session
            finally:
                del self._sessions[loop]

    async def close(self) -> None:
        """Release the connections of this event loop; the next request opens new ones."""
        if found := self._sessions.get(asyncio.get_running_loop()):
            await found[1].aclose()


async def read_answer(response: aiohttp.ClientResponse) -> bytes:
    """A whole answer; raises `RequestError` for one larger than `MOST_BYTES`, read no further."""
    whole = bytearray()
    async for piece in response.content.iter_chunked(1 << 16):
        whole += piece
        if len(whole) > MOST_BYTES:
            raise too_large()
    return bytes(whole)


def too_large() -> RequestError:
    """The failure of a request whose answer is not read to its end; the next run asks again."""
    return RequestError(
        f"Expected an answer of at most {MOST_BYTES >> 20} MiB, unpacked, found a larger one, "
        "which was not read to its end. Lower sampling.max_tokens.",
        type="too large",
    )
