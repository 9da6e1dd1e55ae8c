"""Batch jobs at a provider: which requests lie in which, sent once, looked after, read."""

import asyncio
import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from distill_datasets.errors import (
    DistillError,
    OutputError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.models.openai.batches import BatchJob, BatchState, OpenAIBatches
from distill_datasets.models.sampler import Reply, Sampling

T = TypeVar("T")

_ATTEMPTS = 8
_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS batches (
        key TEXT NOT NULL PRIMARY KEY,
        identity TEXT NOT NULL,
        sampling TEXT NOT NULL,
        requests INTEGER NOT NULL,
        file TEXT,
        sent INTEGER NOT NULL DEFAULT 0,
        name TEXT,
        closed INTEGER NOT NULL DEFAULT 0,
        planned_at REAL NOT NULL
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS batch_requests (
        digest TEXT NOT NULL PRIMARY KEY,
        key TEXT NOT NULL
    )
    """,
)


class BatchTable:
    """The batches of a run, in its journal's file; what is to be sent lies in `folder`."""

    def __init__(self, path: Path) -> None:
        """Open the tables; raises `OutputError` where they can't be written."""
        self.path, self.folder = path, path.parent / "batches"
        with _kept(path):
            self._database = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            for table in _TABLES:
                self._database.execute(table)

    def plan(self, key: str, identity: str, sampling: Sampling, digests: Iterable[str]) -> None:
        """Put requests, none of them in another batch, into a new one."""
        rows = [(digest, key) for digest in digests]
        planned = (key, identity, json.dumps(asdict(sampling)), len(rows), time.time())
        with self._together():
            self._database.executemany("INSERT INTO batch_requests VALUES (?, ?)", rows)
            self._database.execute(
                "INSERT INTO batches (key, identity, sampling, requests, planned_at)"
                " VALUES (?, ?, ?, ?, ?)",
                planned,
            )

    def note(self, key: str, **said: str | bool) -> None:
        """Keep what is known of a batch: the provider's `file` of its requests, that it is `sent`
        and may be worked on from now on, or the `name` under which it is.
        """
        columns = ", ".join(f"{column} = ?" for column in said)
        with _kept(self.path):
            self._database.execute(
                f"UPDATE batches SET {columns} WHERE key = ?",  # noqa: S608 (named in this file)
                (*said.values(), key),
            )

    def close_batch(self, key: str) -> None:
        """All it has answered is in the journal; the others of its requests are free again."""
        with self._together():
            self._database.execute("DELETE FROM batch_requests WHERE key = ?", (key,))
            self._database.execute("UPDATE batches SET closed = 1 WHERE key = ?", (key,))

    def batch_of(self, digest: str) -> str | None:
        """The key of the batch that holds a request and is not over."""
        row = self._database.execute(
            "SELECT key FROM batch_requests WHERE digest = ?", (digest,)
        ).fetchone()
        return None if row is None else str(row[0])

    def digests(self, key: str) -> frozenset[str]:
        """The requests of a batch that is not over."""
        rows = self._database.execute("SELECT digest FROM batch_requests WHERE key = ?", (key,))
        return frozenset(digest for (digest,) in rows)

    @property
    def open(self) -> list[BatchJob]:
        """Every batch that is not over, the oldest first."""
        rows = self._database.execute(
            "SELECT key, identity, sampling, requests, file, sent, name FROM batches"
            " WHERE NOT closed ORDER BY planned_at, key"
        )
        return [
            BatchJob(key, identity, _sampling(text), requests, file, bool(sent), name)
            for key, identity, text, requests, file, sent, name in rows
        ]

    @contextmanager
    def _together(self) -> Iterator[None]:
        with _kept(self.path), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    def __enter__(self) -> Self:
        """The table itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the file."""
        self._database.close()


@dataclass(frozen=True)
class BatchOutcome:
    """How many requests a batch answered or rejected, and what is wrong with the others.

    `problem` may be gone another time, `fatal` ends the run.
    """

    answered: int = 0
    problem: str = ""
    fatal: DistillError | None = None

    def with_(self, other: "BatchOutcome") -> "BatchOutcome":
        """Both together; the first problem stands."""
        return BatchOutcome(
            self.answered + other.answered,
            self.problem or other.problem,
            self.fatal or other.fatal,
        )


class BatchWorker:
    """Handles one provider's batches; whatever it does can be done again after a crash.

    `bought` is told of every reply that is journaled. `rejected` has the requests that the
    provider rejects, by digest, as long as it has answered no other: they aren't final.
    """

    def __init__(
        self,
        provider: OpenAIBatches,
        journal: Journal,
        table: BatchTable,
        *,
        rest_seconds: float,
        bought: Callable[[Reply], None],
    ) -> None:
        """`rest_seconds` lie between two attempts at a call that failed."""
        self.provider, self.journal, self.table = provider, journal, table
        self.rest_seconds, self.bought = rest_seconds, bought
        self.rejected: dict[str, RejectedError] = {}
        self._unread: defaultdict[str, set[str]] = defaultdict(set)  # batches by request
        self._answered = False

    async def recover(self, batch: BatchJob) -> None:
        """Find out whether a batch of an earlier process was ever started; forget it if not."""
        name = await self._insist(lambda: self.provider.find(batch.key)) if batch.sent else None
        if name is None:
            self.table.close_batch(batch.key)
        else:
            self.table.note(batch.key, sent=True, name=name)

    async def submit(self, batch: BatchJob) -> BatchJob:
        """Have the provider work on a planned batch, once, whatever is lost on the way."""
        if batch.name is not None:
            return batch
        try:
            name = await self._insist(lambda: self._start(batch.key))
        except RejectedError as error:
            self.table.close_batch(batch.key)
            raise ServiceError(f"The provider refuses a batch: {error}") from error
        self.table.note(batch.key, sent=True, name=name)
        self._file(batch.key).unlink(missing_ok=True)
        return replace(batch, name=name)

    async def look(self, batch: BatchJob) -> BatchState:
        """How far a batch is."""
        name = batch.name
        assert name is not None
        return await self._insist(lambda: self.provider.look(name))

    async def settle(self, batch: BatchJob, state: BatchState) -> BatchOutcome:
        """Journal all that a batch which is over has answered, and free its other requests.

        Raises what ends a run, such as `AccessError`, when all else is done.
        """
        whole = BatchOutcome()
        digests = self.table.digests(batch.key)
        for file in state.files:
            read = partial(self._read, file, batch, digests)
            try:
                whole = whole.with_(await self._insist(read))
            except RejectedError as error:
                whole = whole.with_(BatchOutcome(problem=f"its answers can't be had: {error}"))
        if self._answered:
            for digest, rejection in self.rejected.items():
                self.journal.reject(digest, batch.identity, rejection)
            self.rejected.clear()
        self.table.close_batch(batch.key)
        if whole.fatal is not None:
            raise whole.fatal
        return whole

    async def _start(self, key: str) -> str:
        (batch,) = (one for one in self.table.open if one.key == key)
        # The answer to an earlier attempt may have been lost, and its batch cost money.
        if batch.sent and (name := await self.provider.find(key)):
            return name
        if batch.file is None:
            file = await self.provider.upload(self._file(key))
            self.table.note(key, file=file)
        else:
            file = batch.file
        self.table.note(key, sent=True)
        return await self.provider.create(file, key)

    async def _read(self, file: str, batch: BatchJob, digests: frozenset[str]) -> BatchOutcome:
        """Journal one of a batch's files."""
        found, replies = BatchOutcome(), list[tuple[str, Reply]]()
        try:
            async for line in self.provider.lines(file):
                digest, answer = self.provider.read(line, batch.sampling)
                if digest is not None and digest not in digests:
                    raise ServiceError(f"The batch {batch.name} answers what it was not asked.")
                if isinstance(answer, Reply):
                    replies.append((str(digest), answer))
                answer = self._given_up(batch, digest, answer)
                if isinstance(answer, RejectedError):
                    self.rejected[str(digest)] = answer
                if isinstance(answer, Reply | RejectedError):
                    found = found.with_(BatchOutcome(answered=1))
                elif isinstance(answer, RequestError):  # a damaged line has no digest
                    found = found.with_(BatchOutcome(problem=str(answer)))
                else:
                    found = found.with_(BatchOutcome(fatal=answer))
        finally:
            self._keep(batch, replies)
        return found

    def _given_up(
        self, batch: BatchJob, digest: str | None, answer: Reply | DistillError
    ) -> Reply | DistillError:
        """What can't be read again and again is rejected, in as many batches as the error says."""
        if digest is None or not isinstance(answer, RetryableError) or not answer.most_attempts:
            return answer
        self._unread[digest].add(batch.key)
        if len(self._unread[digest]) < answer.most_attempts:
            return answer
        return RejectedError(str(answer), type=answer.type, status=answer.status)

    def _keep(self, batch: BatchJob, replies: Sequence[tuple[str, Reply]]) -> None:
        # A file is read again where its first reading broke off.
        new = [(key, reply) for key, reply in replies if self.journal.entry(key) is None]
        self.journal.put_all(batch.identity, new, batch=True)
        for _, reply in new:
            self.bought(reply)
        self._answered = self._answered or bool(replies)

    def _file(self, key: str) -> Path:
        return self.table.folder / f"{key}.jsonl"

    async def _insist(self, make: Callable[[], Awaitable[T]]) -> T:
        """Try again what may succeed later: none of it is paid for twice."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return await make()
            except RetryableError as error:
                await asyncio.sleep(max(self.rest_seconds, error.retry_after or 0.0))
        return await make()


def _sampling(text: str) -> Sampling:
    fields = json.loads(text)
    return Sampling(**{**fields, "stop": tuple(fields["stop"])})


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(
            f"Can't write the batches to {str(path)!r}: {error}. Free some space, and run again: "
            "what was sent is found again."
        ) from error
