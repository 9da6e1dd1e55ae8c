"""The server in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from .app import running
from .model import ModelCard
from .process import new_api_key


def run(
    model: Path, name: str, *, host: str, port: int, api_key: str | None, store: Path | None
) -> None:
    """Serve a model folder; prints what clients have to export."""
    card = ModelCard.read(model, name)
    asyncio.run(_serve(card, store, api_key or new_api_key(), host, port))


async def _serve(card: ModelCard, store: Path | None, api_key: str, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running(card, store, api_key, host=host, port=port) as bound:
        print(
            f"export TINKER_BASE_URL=http://{host}:{bound}\n"
            f"export TINKER_API_KEY={api_key}\n"
            f"# model:    {card.name} (context {card.max_context})\n"
            f"# tokenizer: {card.folder}\n"
            f"# renderer: qwen3_instruct for {card.name} if it is a Qwen3-style chat model\n"
            f"# store:    {store or 'temporary, removed at the end'}\n"
            "# Ctrl-C ends the server",
            flush=True,
        )
        await stop.wait()
