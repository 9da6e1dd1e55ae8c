"""The HTTP application: who may enter, and what a refusal looks like."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from . import listings, sampling_api, training_api
from .failures import MissingError, RequestError
from .model import ModelCard
from .sampling_api import SERVICE
from .service import Service
from .store import Store

LARGEST_BODY = 256 << 20


def _gate(api_key: str) -> Middleware:
    """Let requests with the key through; turn refusals into answers that aren't retried."""
    expected = api_key.encode()

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        found = request.headers.get("X-API-Key", "").encode()
        if not hmac.compare_digest(found, expected) and request.path != "/api/v1/healthz":
            message = (
                "expected the key of this server in X-API-Key; found "
                f"{'another' if found else 'none'}: set TINKER_API_KEY to the key it was "
                "started with (serve prints it, Server.api_key holds it)"
            )
            return web.json_response({"error": message}, status=401)
        try:
            return await handler(request)
        except RequestError as error:
            status = 404 if isinstance(error, MissingError) else 400
            return web.json_response({"error": str(error), "category": "user"}, status=status)
        except (KeyError, ValueError) as error:
            message = f"the request can't be read: {type(error).__name__}: {error}"
            return web.json_response({"error": message, "category": "user"}, status=400)

    return gate


@asynccontextmanager
async def running(
    card: ModelCard, store: Path | None, api_key: str, *, host: str, port: int
) -> AsyncIterator[int]:
    """Serve while the context lasts; yields the port, free if `port` is 0."""
    with TemporaryDirectory(prefix="distill-store-") as temporary:
        app = web.Application(middlewares=[_gate(api_key)], client_max_size=LARGEST_BODY)
        service = app[SERVICE] = Service(card, Store(store or Path(temporary)))
        for module in (sampling_api, training_api, listings):
            app.router.add_routes(module.routes)
        # No grace for open connections: clients hold theirs for as long as they live.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port, backlog=4096)
            await site.start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()
            service.engine.close()
