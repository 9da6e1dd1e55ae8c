"""The embedded server with OpenAI's protocol, on a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from distill_datasets.embedded.app import running
from distill_datasets.embedded.model import ModelCard
from distill_datasets.models.renderers import load_tokenizer
from distill_datasets.serving.answers import ChatFormat
from distill_datasets.serving.server import mount

if TYPE_CHECKING:
    from distill_datasets.recipes.recipe import Recipe

KEY = "tml-key-of-a-test"


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    url: str

    @property
    def openai(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def serving(
    model: Path,
    *,
    store: Path | None = None,
    students: Mapping[str, str] | None = None,
    recipe: Recipe | None = None,
) -> Iterator[Address]:
    """Serve a model's folder under the name of the folder."""
    ready, ended = threading.Event(), asyncio.Event()
    ports: list[int] = []
    failures: list[BaseException] = []
    loop = asyncio.new_event_loop()
    format = ChatFormat(load_tokenizer(str(model)), "distill_datasets/chat_template")

    def extend(app: web.Application) -> None:
        mount(app, KEY, format, dict(students or {}), recipe)

    async def serve() -> None:
        card = ModelCard.read(model, model.name)
        async with running(card, store, KEY, extend=extend) as port:
            ports.append(port)
            ready.set()
            await ended.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    if failures:
        raise failures[0]
    try:
        yield Address(f"http://127.0.0.1:{ports[0]}")
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
