"""The HTTP application: keys, refusals, and the entry point of the server's process."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from distill_datasets.errors import DistillError

from .endpoints import SERVICE, routes
from .model import ModelCard
from .service import Service
from .store import Store
from .wire import LARGEST_BODY, InvalidRequestError, MissingError

HOST = "127.0.0.1"


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": message, "category": "user"}, status=status)


def _gate(api_key: str) -> Middleware:
    """Let requests with the key through; turn refusals into answers that aren't retried."""
    expected = api_key.encode()

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
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
    card: ModelCard, store: Path | None, api_key: str, *, host: str, port: int
) -> AsyncIterator[int]:
    """Serve while the context lasts; yields the port, free if `port` is 0."""
    with TemporaryDirectory(prefix="distill-store-") as temporary:
        app = web.Application(middlewares=[_gate(api_key)], client_max_size=LARGEST_BODY)
        service = app[SERVICE] = Service(card, Store(store or Path(temporary)))
        app.router.add_routes(routes)
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


async def serve_until_interrupted(
    card: ModelCard, store: Path | None, api_key: str, host: str, port: int
) -> None:
    """Serve in the foreground until Ctrl-C; prints what clients have to export."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    async with running(card, store, api_key, host=host, port=port) as bound:
        print(
            f"export TINKER_BASE_URL=http://{host}:{bound}\n"
            f"export TINKER_API_KEY={api_key}\n"
            f"# model:    {card.name} (context {card.max_context}, {card.dtype})\n"
            f"# tokenizer: {card.folder}\n"
            f"# renderer: qwen3_instruct for {card.name} if it is a Qwen3-style chat model\n"
            f"# store:    {store or 'temporary, removed at the end'}\n"
            "# Ctrl-C ends the server",
            flush=True,
        )
        await stop.wait()


async def _serve_parent(card: ModelCard, store: Path | None, api_key: str, said: str) -> None:
    async with running(card, store, api_key, host=HOST, port=0) as port:
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
