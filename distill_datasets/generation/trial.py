"""A few rows asked for real, to find out what the others will take."""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_datasets.errors import DistillError, RequestError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, run_in_thread
from distill_datasets.generation.estimate import Heard, size_of
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest
from distill_datasets.progress import Progress
from distill_datasets.schema import Message


@dataclass(frozen=True)
class Sampled:
    """A row that was really asked; `seconds` is None where the journal had its answer."""

    query: str
    text: str | None
    answer: str | None
    problem: str | None
    seconds: float | None


@dataclass(frozen=True)
class Trial:
    """The rows, and every request that they took."""

    sampled: tuple[Sampled, ...]
    heard: tuple[Heard, ...]


def ask_some(
    answering: Answerer,
    rows: Sequence[dict[str, Any]],
    *,
    journal: Path | None,
    limits: Limits,
    meter: Meter | None,
) -> Trial:
    """Ask rows of `query` and `reference` for real, which costs; answers go into the journal.

    Without a `journal` they are kept nowhere. A row that fails is one with a problem; raises what
    no row would escape.
    """
    with ExitStack() as stack:
        path = journal or Path(stack.enter_context(tempfile.TemporaryDirectory()), "journal")
        answers = stack.enter_context(Journal(path))
        progress = stack.enter_context(Progress("sample", len(rows), meter=meter))
        clients = [_Listener(answers, progress, limits, meter) for _ in rows]

        def stop() -> None:
            for client in clients:
                client.stop()

        sampled = run_in_thread(lambda: _ask_all(answering, rows, clients), stop=stop)
    return Trial(tuple(sampled), tuple(heard for client in clients for heard in client.heard))


async def _ask_all(
    answering: Answerer, rows: Sequence[dict[str, Any]], clients: "Sequence[_Listener]"
) -> list[Sampled]:
    asked = [_ask_one(answering, row, client) for row, client in zip(rows, clients, strict=True)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    for one in found:
        if isinstance(one, DistillError) and not isinstance(one, RequestError):
            raise one
    return [
        one
        if isinstance(one, Sampled)
        else Sampled(row["query"], None, None, f"{type(one).__name__}: {one}", None)
        for row, one in zip(rows, found, strict=True)
    ]


async def _ask_one(answering: Answerer, row: dict[str, Any], client: "_Listener") -> Sampled:
    query = row["query"]
    client.expected = {one.request_key(query) for one in answering.asked(query)}
    began = time.monotonic()
    first, *_ = await answering.answer(query, client, row["reference"])
    seconds = time.monotonic() - began if any(one.bought for one in client.heard) else None
    client.progress.advance(1)
    return Sampled(query, first.get("raw"), first.get("answer"), first.get("rejection"), seconds)


class _Listener(CachedClient):
    """Samples for one row, and remembers what was asked and what came."""

    def __init__(
        self, journal: Journal, progress: Progress, limits: Limits, meter: Meter | None
    ) -> None:
        super().__init__(journal, progress, limits=limits, meter=meter)
        self.heard: list[Heard] = []
        self.expected: set[str] = set()

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """As ever."""
        key = request_digest(sampler.identity, messages, sampling)
        known = self.journal.entry(key) is not None
        reply = await super().sample(sampler, messages, sampling)
        self.heard.append(Heard(sampler, size_of(messages), reply, not known, key in self.expected))
        return reply
