"""Serves a local model in the foreground, in OpenAI's protocol and in Tinker's."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from distill_datasets.embedded.app import OTHER, SERVICE, running
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.process import new_api_key
from distill_datasets.errors import DistillError, ServiceError, SettingsError
from distill_datasets.models.connection import find_served, load_tokenizer
from distill_datasets.recipes.loading import load_recipe

from .openai_app import openai_app
from .served import Catalogue, ChatFormat, open_models, read_names
from .settings import ServeSettings

if TYPE_CHECKING:
    from distill_datasets.recipes.recipe import Recipe

API_KEY = "DISTILL_API_KEY"
_LEAST_KEY = 8
_RENDERERS = {"pocket": "qwen3_instruct"}
_CHAT_TEMPLATE = "distill_datasets/chat_template"


def serve(model: str, settings: ServeSettings) -> None:
    """Serve a local model and students of it until Ctrl-C; says what clients have to export."""
    name, folder = find_served(model)
    dtype = settings.dtype or os.environ.get("EMBEDDED_DTYPE", "auto")
    card = ModelCard.read(folder.resolve(), name, dtype, settings.threads)
    key = _read_key(settings.api_key or os.environ.get(API_KEY))
    chosen = settings.renderer or _RENDERERS.get(model, _CHAT_TEMPLATE)
    format = ChatFormat(load_tokenizer(str(folder)), chosen)
    recipe = None if settings.recipe is None else load_recipe(settings.recipe)
    students = read_names(settings.students)
    if said := card.foretold():
        print(said, file=sys.stderr)
    models: list[Catalogue] = []

    def extend(app: web.Application) -> None:
        models.append(mount(app, key, format, students, recipe))

    try:
        asyncio.run(_until_interrupted(card, key, settings, extend, models))
    except DistillError:
        raise
    except OSError as error:
        raise ServiceError(
            f"Can't serve at {settings.host}:{settings.port}: {error}. Choose another --host or "
            "--port."
        ) from error


def mount(
    app: web.Application,
    api_key: str,
    format: ChatFormat,
    students: dict[str, str],
    recipe: Recipe | None,
) -> Catalogue:
    """Add OpenAI's protocol to an embedded server's application."""
    service = app[SERVICE]
    models = open_models(service, format, students, recipe)
    app.add_subapp(OTHER.rstrip("/"), openai_app(service, models, api_key))
    return models


def _read_key(given: str | None) -> str:
    if given is None:
        return new_api_key()
    if len(given) < _LEAST_KEY or not given.isascii() or not given.isprintable() or " " in given:
        raise SettingsError(
            f"Expected a key of at least {_LEAST_KEY} letters, digits and signs without blanks in "
            f"--api-key or {API_KEY}; found one of {len(given)} characters."
        )
    return given


async def _until_interrupted(
    card: ModelCard,
    api_key: str,
    settings: ServeSettings,
    extend: Callable[[web.Application], None],
    models: Sequence[Catalogue],
) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    host, store = settings.host, settings.store
    served = running(card, store, api_key, host=host, port=settings.port, extend=extend)
    async with served as port:
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(
            f"export OPENAI_BASE_URL={address}/v1\n"
            f"export OPENAI_API_KEY={api_key}\n"
            f"export TINKER_BASE_URL={address}\n"
            f"export TINKER_API_KEY={api_key}\n"
            f"# models:    {', '.join(name for one in models for name in one.models)}\n"
            f"# context:   {card.max_context} tokens, computed in {card.dtype}\n"
            f"# tokenizer: {card.folder} (for the Tinker Cookbook the model_name too)\n"
            f"# store:     {store or 'temporary, removed at the end'}\n"
            "# Ctrl-C ends the server",
            flush=True,
        )
        await stop.wait()
