"""The HTTP application: keys, refusals, and the entry point of the server's process."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from distill_datasets.errors import DistillError

from .endpoints import SERVICE, routes
from .model import ModelCard
from .process import HOST
from .service import Service
from .store import Store
from .wire import LARGEST_BODY, InvalidRequestError, MissingError

# Where another protocol may be spoken.
OTHER = "/v1/"


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": message, "category": "user"}, status=status)


def _gate(api_key: str) -> Middleware:
    """Let requests with the key through; turn refusals into answers that aren't retried.

    What lies under `OTHER` has a gate of its own.
    """
    expected = api_key.encode()

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(OTHER):
            return await handler(request)
        found = request.headers.get("X-API-Key", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(found, expected) and request.path != "/api/v1/healthz":
            message = (
                "expected the key of this server in X-API-Key; found "
                f"{'another' if found else 'none'}: set TINKER_API_KEY to the key it was "
                "started with (serve prints it, Server.api_key holds it)"
            )
            return web.json_response({"error": message}, status=401)
        try:
            return await handler(request)
        except MissingError as error:
            return _refused(404, str(error))
        except DistillError as error:
            return _refused(400, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _refused(400, f"expected at most {LARGEST_BODY} bytes in a request; found more")
        except (web.RequestPayloadError, UnicodeError) as error:
            return _refused(400, f"the request can't be read: {type(error).__name__}: {error}")

    return gate


@asynccontextmanager
async def running(
    card: ModelCard,
    store: Path | None,
    api_key: str,
    *,
    host: str = HOST,
    port: int = 0,
    extend: Callable[[web.Application], None] | None = None,
) -> AsyncIterator[int]:
    """Serve while the context lasts; yields the port, free if `port` is 0.

    `extend` may add what lies under `OTHER`.
    """
    with TemporaryDirectory(prefix="distill-store-") as temporary:
        app = web.Application(middlewares=[_gate(api_key)], client_max_size=LARGEST_BODY)
        service = app[SERVICE] = Service(card, Store(store or Path(temporary)))
        app.router.add_routes(routes)
        if extend is not None:
            extend(app)
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


async def _serve_parent(card: ModelCard, store: Path | None, api_key: str, said: str) -> None:
    async with running(card, store, api_key) as port:
        print(json.dumps({"port": port, "dtype": card.dtype, "said": said}), flush=True)
        # The pipe closes with the parent, however that ends.
        await asyncio.to_thread(sys.stdin.read)


def main() -> int:
    """Serve until the parent closes stdin or dies; its first line is the key."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    api_key = sys.stdin.readline().strip()
    try:
        dtype = os.environ.get("EMBEDDED_DTYPE", "auto")
        card = ModelCard.read(options.model.resolve(), options.name, dtype)
        said = card.foretold()
    except InvalidRequestError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(_serve_parent(card, options.store, api_key, said))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Everything is closed and removed by now; unloading torch would take seconds more.
    os._exit(code)
