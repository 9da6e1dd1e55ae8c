"""Buys answers: from the journal where they are, from a sampler where not, each once."""

import asyncio
from collections.abc import Sequence

from distill_datasets.journal import Journal
from distill_datasets.progress import Progress
from distill_datasets.sampler import Message, Reply, Sampler, Sampling, request_digest


class Buyer:
    """One journal for everything that is asked; two who ask the same share one request."""

    def __init__(self, journal: Journal, progress: Progress) -> None:
        """`progress` hears of the tokens that were bought, not of rows."""
        self.journal, self.progress = journal, progress
        self._stopped = False
        self._asked: dict[str, asyncio.Event] = {}

    def stop(self) -> None:
        """Ask nothing more: `buy` raises `InterruptedError` from now on."""
        self._stopped = True

    async def buy(self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The journal's answer, or a bought one, which is in the journal before anyone reads it."""
        if self._stopped:
            raise InterruptedError("stopped before this row was asked")
        key = request_digest(sampler.identity, messages, sampling)
        if known := self.journal.get(key):
            return known
        while key in self._asked:
            await self._asked[key].wait()
            if known := self.journal.get(key):
                return known
        self._asked[key] = asyncio.Event()
        try:
            reply = await sampler.sample(messages, sampling)
            self.journal.put(key, sampler.identity, reply)
        finally:
            self._asked.pop(key).set()
        tokens = reply.usage.prompt_tokens + sum(sample.tokens for sample in reply.samples)
        self.progress.advance(0, tokens=tokens)
        return reply
