"""Sends planned batches, looks after them, and journals what they answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from distill_datasets.errors import DistillError, RejectedError, RetryableError, ServiceError
from distill_datasets.generation.batch_book import BatchBook
from distill_datasets.generation.cache import Journal
from distill_datasets.models.batches import Batch, BatchProvider, BatchState
from distill_datasets.models.sampler import Reply

T = TypeVar("T")

_ATTEMPTS = 8


@dataclass(frozen=True)
class Outcome:
    """How many requests a batch answered or rejected, and what is wrong with the others.

    `problem` may be gone another time, `fatal` ends the run.
    """

    answered: int = 0
    problem: str = ""
    fatal: DistillError | None = None

    def with_(self, other: "Outcome") -> "Outcome":
        """Both together; the first problem stands."""
        return Outcome(
            self.answered + other.answered,
            self.problem or other.problem,
            self.fatal or other.fatal,
        )


class Desk:
    """Handles one provider's batches; whatever it does can be done again after a crash.

    `heard` is told of every reply as it is journaled.
    """

    def __init__(
        self,
        provider: BatchProvider,
        journal: Journal,
        book: BatchBook,
        *,
        rest_seconds: float,
        heard: Callable[[Reply], None],
    ) -> None:
        """`rest_seconds` lie between two attempts at a call that failed."""
        self.provider, self.journal, self.book = provider, journal, book
        self.rest_seconds, self.heard = rest_seconds, heard

    async def recover(self, batch: Batch) -> None:
        """Find out whether a batch of an earlier process was ever started; forget it if not."""
        name = await self._insist(lambda: self.provider.find(batch.key)) if batch.sent else None
        if name is None:
            self.book.close_batch(batch.key)
        else:
            self.book.start(batch.key, name)

    async def submit(self, batch: Batch) -> Batch:
        """Have the provider work on a planned batch, once, whatever is lost on the way."""
        if batch.name is not None:
            return batch
        try:
            name = await self._insist(lambda: self._start(batch.key))
        except RejectedError as error:
            self.book.close_batch(batch.key)
            raise ServiceError(f"The provider refuses a batch: {error}") from error
        self.book.start(batch.key, name)
        self._file(batch.key).unlink(missing_ok=True)
        return replace(batch, name=name)

    async def look(self, batch: Batch) -> BatchState:
        """How far a batch is."""
        name = batch.name
        assert name is not None
        return await self._insist(lambda: self.provider.look(name))

    async def settle(self, batch: Batch, state: BatchState) -> Outcome:
        """Journal all that a batch which is over has answered, and free its other requests.

        Raises what ends a run, such as `AccessError`, when all else is done.
        """
        whole = Outcome()
        digests = self.book.digests(batch.key)
        for file in state.files:
            read = partial(self._read, file, batch, digests)
            try:
                whole = whole.with_(await self._insist(read))
            except RejectedError as error:
                whole = whole.with_(Outcome(problem=f"its answers can't be had: {error}"))
        self.book.close_batch(batch.key)
        if whole.fatal is not None:
            raise whole.fatal
        return whole

    async def _start(self, key: str) -> str:
        (batch,) = (one for one in self.book.open if one.key == key)
        # The answer to an earlier attempt may have been lost, and its batch cost money.
        if batch.sent and (name := await self.provider.find(key)):
            return name
        if batch.file is None:
            file = await self.provider.upload(self._file(key))
            self.book.upload(key, file)
        else:
            file = batch.file
        self.book.send(key)
        return await self.provider.create(file, key)

    async def _read(self, file: str, batch: Batch, digests: frozenset[str]) -> Outcome:
        """Journal one of a batch's files."""
        found = Outcome()
        async for line in self.provider.lines(file):
            digest, answer = self.provider.read(line, batch.sampling)
            if digest not in digests:
                raise ServiceError(f"The batch {batch.name} answers what it was not asked.")
            if isinstance(answer, Reply):
                self._keep(digest, batch, answer)
                found = found.with_(Outcome(answered=1))
            elif isinstance(answer, RejectedError):
                self._reject(digest, batch, answer)
                found = found.with_(Outcome(answered=1))
            elif isinstance(answer, RetryableError):
                found = found.with_(Outcome(problem=str(answer)))
            else:
                found = found.with_(Outcome(fatal=answer))
        return found

    def _keep(self, digest: str, batch: Batch, reply: Reply) -> None:
        # A file is read again where its first reading broke off.
        if self.journal.entry(digest) is None:
            self.journal.put(digest, batch.identity, reply, batch=True)
            self.heard(reply)

    def _reject(self, digest: str, batch: Batch, error: RejectedError) -> None:
        self.journal.reject(
            digest, batch.identity, type=error.type, status=error.status, message=str(error)
        )

    def _file(self, key: str) -> Path:
        return self.book.folder / f"{key}.jsonl"

    async def _insist(self, make: Callable[[], Awaitable[T]]) -> T:
        """Try again what may succeed later: none of it is paid for twice."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return await make()
            except RetryableError as error:
                await asyncio.sleep(max(self.rest_seconds, error.retry_after or 0.0))
        return await make()
