"""Buys answers in a provider's batches, at half price and within a day, before `ask` reads them."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill_datasets.errors import ModelError, PendingError, PriceError, ServiceError
from distill_datasets.generation.batch_book import BatchBook, alone
from distill_datasets.generation.batch_files import BatchFiles, provider_of
from distill_datasets.generation.batch_jobs import Desk, Outcome
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import run_apart
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.batches import Batch, BatchState
from distill_datasets.models.sampler import Reply, Sampler, Sampling
from distill_datasets.progress import Progress
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from datasets import Dataset

_MOST = 1_000_000_000  # requests in a batch, where only the provider bounds them
_FRUITLESS = 2


@dataclass(frozen=True)
class Patience:
    """Seconds between two looks at batches, and whether to stay until they are over."""

    poll_seconds: float = 60.0
    wait: bool = True


def buy_in_batches(
    queries: "Dataset",
    answering: Answerer,
    journal: Journal,
    *,
    patience: Patience,
    meter: Meter | None = None,
) -> None:
    """Put the answers to all queries into the journal, as far as providers sell in batches.

    What is asked only because of an answer (a judge's opinion) goes into batches of its own once
    that answer is there. Batches outlive this process: called again, even days later, it reads
    them, and sends again only what expired or failed. Raises `ModelError` where no teacher's
    provider has batches, `PriceError` for a budget, `PendingError` where `patience` doesn't wait,
    and `ServiceError` for batches that failed or were cancelled.
    """
    if getattr(meter, "budget", None) is not None:
        raise PriceError(
            "A budget can't stop a batch that was sent. Leave out the budget and bound the run "
            "with a limit of queries, or ask one by one."
        )
    with BatchBook(journal.path) as book, alone(book.folder), _noted(book):
        rounds = _Rounds(journal, book, patience, meter)
        run_apart(lambda: rounds.run(queries, answering))


@contextmanager
def _noted(book: BatchBook) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if started := [batch for batch in book.open if batch.name]:
            interrupt.add_note(_pending(started))
        raise


def _pending(batches: Sequence[Batch]) -> str:
    names = ", ".join(str(batch.name) for batch in batches[:3]) + ", …" * (len(batches) > 3)
    return (
        f"{len(batches)} batches ({names}) with {sum(batch.requests for batch in batches):,} "
        "requests are being worked on at the provider, usually for less than a day, whether or "
        "not anyone waits. Run the same command again, on any day, to read them and go on."
    )


class _Rounds:
    """Writes files, has them worked on, reads the answers; again until nothing is missing."""

    def __init__(
        self, journal: Journal, book: BatchBook, patience: Patience, meter: Meter | None
    ) -> None:
        self.journal, self.book, self.patience, self.meter = journal, book, patience, meter
        self._most = _MOST
        self._fruitless = 0

    async def run(self, queries: "Dataset", answering: Answerer) -> None:
        """Until everything that a batch can answer is in the journal."""
        for file in self.book.folder.glob("*.jsonl"):
            file.unlink()  # of a process that ended before it sent them
        while True:
            with Progress("look for answers", len(queries)) as progress:
                files = BatchFiles(self.journal, self.book, progress, most=self._most)
                await files.fill(queries, answering)
            if files.others and not files.samplers:
                raise ModelError(
                    f"{answering.model!r} has no batches: only 'openai:' models do, where their "
                    "provider offers them. Run without --batch."
                )
            if not files.needed:
                return
            await self._buy(files)

    async def _buy(self, files: BatchFiles) -> None:
        batches = [batch for batch in self.book.open if batch.key in files.needed]
        lost = [batch for batch in batches if not batch.name and batch.key not in files.planned]
        with Progress(
            "batches", sum(batch.requests for batch in batches), unit="requests", meter=self.meter
        ) as progress:
            desks = {
                identity: self._desk(sampler, progress)
                for identity, sampler in files.samplers.items()
            }
            for batch in lost:
                await desks[batch.identity].recover(batch)
            if lost:
                return
            started = [await desks[batch.identity].submit(batch) for batch in batches]
            await self._attend(started, desks, progress)

    def _desk(self, sampler: Sampler, progress: Progress) -> Desk:
        provider = provider_of(sampler)
        assert provider is not None
        discounted = Discounted(sampler)

        def heard(reply: Reply) -> None:
            tokens = reply.usage.prompt_tokens + sum(sample.tokens for sample in reply.samples)
            progress.advance(0, tokens=tokens)
            if self.meter:
                self.meter.count(discounted, reply)

        return Desk(
            provider,
            self.journal,
            self.book,
            rest_seconds=self.patience.poll_seconds,
            heard=heard,
        )

    async def _attend(
        self, batches: Sequence[Batch], desks: Mapping[str, Desk], progress: Progress
    ) -> None:
        """Look after batches until all are over."""
        waiting, seen = list(batches), Counter[str]()
        whole, refused = Outcome(), 0
        while waiting:
            for batch in list(waiting):
                state = await desks[batch.identity].look(batch)
                progress.advance(
                    state.done - seen[batch.key], note=f"{len(waiting)} open, {state.status}"
                )
                seen[batch.key] = state.done
                if state.over:
                    waiting.remove(batch)
                    whole = whole.with_(await _end(batch, state, desks[batch.identity]))
                    refused = max(refused, batch.requests if state.too_much else 0)
            if waiting and not self.patience.wait:
                raise PendingError(_pending(waiting))
            if waiting or whole.problem:
                await asyncio.sleep(self.patience.poll_seconds)
        self._learn(whole, refused)

    def _learn(self, whole: Outcome, refused: int) -> None:
        """Make batches smaller that the provider finds too large; give up what bears no fruit."""
        if whole.answered:
            self._fruitless = 0
        elif refused > 1:
            self._most = refused // 2
        else:
            self._fruitless += 1
        if self._fruitless == _FRUITLESS:
            raise ServiceError(
                f"Batches come back without one answer ({whole.problem}). Run without --batch, or "
                "later again: nothing is paid twice."
            )


async def _end(batch: Batch, state: BatchState, desk: Desk) -> Outcome:
    """Read what a batch that is over has answered; explain one that was stopped."""
    found = await desk.settle(batch, state)
    if state.status == "cancelled":
        raise ServiceError(
            f"The batch {batch.name} was cancelled at the provider; the {found.answered} answers "
            "that it had are kept. Run again to have the others worked on."
        )
    if state.status == "failed" and not state.too_much:
        raise ServiceError(
            f"The batch {batch.name} failed at the provider: {state.problem or 'no reason given'}. "
            "Mend the cause and run again: nothing is paid twice."
        )
    missing = batch.requests - found.answered
    why = found.problem or state.problem or f"{missing} requests left out by a batch {state.status}"
    return replace(found, problem=why if missing else "")


@dataclass(frozen=True)
class Discounted:
    """A sampler as a meter sees it whose replies come at the price of batches."""

    sampler: Sampler
    batch: bool = True

    @property
    def model(self) -> str:
        """The sampler's."""
        return self.sampler.model

    @property
    def identity(self) -> str:
        """The sampler's."""
        return self.sampler.identity

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The sampler's, one by one."""
        return await self.sampler.sample(messages, sampling)
