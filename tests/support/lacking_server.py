"""A server of Tinker's protocol that lacks what it is told to lack: the embedded one, behind a
proxy that answers 404 for it as routers do."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web


@dataclass
class LackingServer:
    """`lacks` holds patterns of "METHOD path"; `refused` what it answered 404 to so far."""

    behind: str
    lacks: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    status: int = 404
    url: str = ""

    @contextmanager
    def without(self, *lacks: str, status: int = 404) -> Iterator[LackingServer]:
        """Lack these for a block."""
        self.lacks, self.refused, self.status = set(lacks), [], status
        try:
            yield self
        finally:
            self.lacks = set()

    async def _pass_on(self, request: web.Request) -> web.Response:
        asked = f"{request.method} {request.path.removeprefix('/api/v1/')}"
        if any(re.fullmatch(pattern, asked) for pattern in self.lacks):
            self.refused.append(asked)
            return web.json_response({"detail": "Not Found"}, status=self.status)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in ("host", "content-length", "transfer-encoding")
        }
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                self.behind + request.path_qs,
                headers=headers,
                data=await request.read(),
            ) as answer,
        ):
            return web.Response(
                body=await answer.read(),
                status=answer.status,
                headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")},
            )

    async def _serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def lacking(behind: str) -> Iterator[LackingServer]:
    """The server in front of the one at `behind`, on a thread of its own."""
    server, ready, loop = LackingServer(behind), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server._serve(ready, stop)))
    thread.start()
    ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
