"""A reverse proxy that answers everything a while later, as a server far away does."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

_OWN = {"host", "content-length", "transfer-encoding", "connection", "content-encoding"}


@contextmanager
def far_away(url: str, seconds: float) -> Iterator[str]:
    """The address of a proxy to `url`; each request takes so much longer."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="latency proxy", daemon=True)
    thread.start()
    runner, address = asyncio.run_coroutine_threadsafe(_serve(url, seconds), loop).result()
    try:
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _serve(url: str, seconds: float) -> tuple[web.AppRunner, str]:
    session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))

    async def forward(request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(seconds / 2)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OWN}
        async with session.request(
            request.method, url + request.raw_path, data=body, headers=headers
        ) as answer:
            content = await answer.read()
        await asyncio.sleep(seconds / 2)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _OWN}
        return web.Response(body=content, status=answer.status, headers=kept)

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{tail:.*}", forward)

    async def close(_: web.Application) -> None:
        await session.close()

    app.on_cleanup.append(close)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, auto_decompress=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}"
