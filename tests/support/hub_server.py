"""A small Hugging Face Hub on this machine: what it serves, what it saw, and what goes wrong."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aiohttp import web

from tests.support.hub_reads import Access, Reading
from tests.support.hub_store import Refusal, Store
from tests.support.hub_writes import Writing

HOST = "127.0.0.1"
STORAGE = "localhost"  # the same machine, but clients tell hosts apart by name
VIEWER = f"datasets-server.{HOST}"  # `datasets` makes this name out of the Hub's; asked by proxy

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Moment = Literal["", "before", "after"]


@dataclass
class Seen:
    """A request; `status` 0 means that the answer never left."""

    method: str
    path: str  # as sent, still quoted
    query: str
    host: str
    token: bool
    status: int = 0

    @property
    def elsewhere(self) -> bool:
        """Whether it was for a host outside, and came here because this is the proxy."""
        return self.method == "CONNECT" or self.name not in (HOST, STORAGE, VIEWER)

    @property
    def leak(self) -> bool:
        """Whether a token went to a host that is not the Hub."""
        return self.token and self.name not in (HOST, VIEWER)

    @property
    def name(self) -> str:
        return self.host.rsplit(":", 1)[0]


@dataclass
class Fault:
    """What goes wrong with requests whose path matches: `times` of them, after `skip` of them.

    `foreign` is a commit of somebody else that lands just before the request. `drop` closes the
    connection and `kill` ends the client, before or after the request has had its effect. A
    `status` is answered in place of the effect.
    """

    path: str
    method: str = ""
    times: int = 1
    skip: int = 0
    status: int = 0
    message: str = "injected fault"
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Moment = ""
    kill: Moment = ""
    foreign: Mapping[str, bytes | None] = field(default_factory=dict)

    def strikes(self, method: str, path: str) -> bool:
        """Whether it hits this request; counts it if so."""
        if not self.times or self.method not in ("", method) or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class HubServer:
    """The Hub on a free port, in a thread of its own.

    `tokens` gives each token's owner and role ("read" or "write"). Requests for any other host
    that come here through a proxy setting are refused and logged.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Mapping[str, tuple[str, str]],
        organizations: Mapping[str, set[str]],
    ) -> None:
        self.store = Store(folder)
        access = Access(self.store, tokens, organizations)
        self.reading, self.writing = Reading(access), Writing(access)
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.kill: Callable[[], None] = lambda: None
        self.endpoint = ""

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="hub")
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self.loop).result(30)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._answer], client_max_size=1 << 30)
        self.reading.add_to(app)
        self.writing.add_to(app)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, HOST, 0)
        await site.start()
        port = self.runner.addresses[0][1]
        self.endpoint = f"http://{HOST}:{port}"
        self.reading.storage = self.writing.storage = f"http://{STORAGE}:{port}"

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        seen = Seen(
            request.method,
            request.rel_url.raw_path,
            request.rel_url.raw_query_string,
            request.host,
            "Authorization" in request.headers,
        )
        self.seen.append(seen)
        faults = [fault for fault in self.faults if fault.strikes(seen.method, seen.path)]
        try:
            if seen.elsewhere:
                raise Refusal(403, "The test Hub is not a way out")
            for fault in faults:
                self._before(request, fault)
            response = await handler(request)
        except Refusal as refusal:
            response = refused(refusal)
        except web.HTTPException as error:
            response = refused(Refusal(error.status, "Sorry, we can't find this page."))
        for fault in faults:
            self._break(request, fault, "after")
        if request.transport is not None and not request.transport.is_closing():
            seen.status = response.status
        return response

    def _before(self, request: web.Request, fault: Fault) -> None:
        if fault.foreign:
            kind = request.match_info.get("kind", "models")
            repository = self.store.repositories[kind, request.match_info["repo"]]
            self.store.change(repository, fault.foreign)
        if self._break(request, fault, "before"):
            raise Refusal(500, "Nobody reads this")
        if fault.status:
            raise Refusal(fault.status, fault.message, fault.code, fault.headers)

    def _break(self, request: web.Request, fault: Fault, moment: Moment) -> bool:
        """Close the connection, and end the client, if this is the moment to."""
        if fault.kill == moment:
            self.kill()
        broken = moment in (fault.kill, fault.drop)
        if broken and request.transport is not None:
            request.transport.close()
        return broken


def refused(refusal: Refusal) -> web.Response:
    headers = {"X-Error-Message": refusal.message.replace("\n", " "), **refusal.headers}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return web.json_response(refusal.body, status=refusal.status, headers=headers)
