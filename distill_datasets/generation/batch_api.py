"""Buys answers in a provider's batches: half the price, within a day, into the journal."""

import asyncio
import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar
from uuid import uuid4
from warnings import warn

from distill_datasets.errors import (
    DistillError,
    ModelError,
    OutputError,
    PendingError,
    PriceError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.files import one_writer
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import run_in_thread
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.openai import BatchJob, BatchState, OpenAIBatches
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest
from distill_datasets.progress import Progress
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_MOST = 1_000_000_000  # requests in a batch, where only the provider bounds them
_FRUITLESS = 2  # batches in a row that may come back without one answer
_ROWS_AT_ONCE = 1_000
_ATTEMPTS = 8
_TABLES = """
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
);
CREATE TABLE IF NOT EXISTS batch_requests (
    digest TEXT NOT NULL PRIMARY KEY,
    key TEXT NOT NULL
);
"""


def buy_in_batches(
    queries: "Dataset",
    teachers: Answerer,
    journal: Journal,
    *,
    settings: GenerateSettings,
    meter: Meter | None = None,
) -> None:
    """Put the answers to all queries into the journal, as far as providers sell in batches.

    What is asked only because of an answer (a judge's opinion) goes into batches of its own once
    that answer is there. Batches outlive this process: called again, even days later, it reads
    them, and sends again only what expired or failed. Raises `ModelError` where no teacher's
    provider has batches, `PriceError` for a budget, `PendingError` where the settings say not to
    wait, and `ServiceError` for batches that failed or were cancelled.
    """
    if meter and meter.budget is not None:
        raise PriceError(
            "A budget can't stop a batch that was sent. Leave out the budget and bound the run "
            "with a limit of queries, or ask one by one."
        )
    with BatchTable(journal.path) as table, one_writer(table.folder, "batch"):
        rounds = _Rounds(journal, table, settings, meter)
        try:
            run_in_thread(lambda: rounds.run(queries, teachers))
        except KeyboardInterrupt as interrupt:
            if started := [batch for batch in table.open if batch.name]:
                interrupt.add_note(_pending(started))
            raise


def _pending(batches: Sequence[BatchJob]) -> str:
    names = ", ".join(str(batch.name) for batch in batches[:3]) + ", …" * (len(batches) > 3)
    return (
        f"{len(batches)} batches ({names}) with {sum(batch.requests for batch in batches):,} "
        "requests are being worked on at the provider, usually for less than a day, whether or "
        "not anyone waits. Run the same command again, on any day, to read them and go on."
    )


class BatchTable:
    """The batches of a run, in its journal's file; what is to be sent lies in `folder`."""

    def __init__(self, path: Path) -> None:
        """Open the tables; raises `OutputError` where they can't be written."""
        self.path, self.folder = path, path.parent / "batches"
        with self._kept():
            self._database = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(_TABLES)

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
        with self._kept():
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
        jobs = []
        for key, identity, text, requests, file, sent, name in rows:
            fields = json.loads(text)
            sampling = Sampling(**{**fields, "stop": tuple(fields["stop"])})
            jobs.append(BatchJob(key, identity, sampling, requests, file, bool(sent), name))
        return jobs

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(
                f"Can't write the batches to {str(self.path)!r}: {error}. Free some space, and run "
                "again: what was sent is found again."
            ) from error

    @contextmanager
    def _together(self) -> Iterator[None]:
        with self._kept(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    def __enter__(self) -> Self:
        """The table itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the file."""
        self._database.close()


class _Rounds:
    """Writes files, has them worked on, reads the answers; again until nothing is missing."""

    def __init__(
        self, journal: Journal, table: BatchTable, settings: GenerateSettings, meter: Meter | None
    ) -> None:
        self.journal, self.table, self.settings, self.meter = journal, table, settings, meter
        self._most = _MOST
        self._fruitless = 0
        self._one_by_one = False
        self._workers: dict[str, _BatchWorker] = {}  # by the sampler's identity
        self._progress: Progress

    async def run(self, queries: "Dataset", teachers: Answerer) -> None:
        """Until everything that a batch can answer is in the journal."""
        for file in self.table.folder.glob("*.jsonl"):
            file.unlink()  # of a process that ended before it sent them
        while True:
            rejected = {
                digest: error
                for worker in self._workers.values()
                for digest, error in worker.rejected.items()
            }
            files = _BatchFiles(self.journal, self.table, self._most, rejected, self._one_by_one)
            with Progress("look for answers", len(queries)) as progress:
                await files.fill(queries, teachers, progress)
            if files.others and not files.samplers:
                raise ModelError(
                    f"{teachers.model!r} has no batches: only 'openai:' models do, where their "
                    "provider offers them. Run without --batch."
                )
            if not files.needed:
                return
            await self._buy(files)

    async def _buy(self, files: "_BatchFiles") -> None:
        batches = [batch for batch in self.table.open if batch.key in files.needed]
        lost = [batch for batch in batches if not batch.name and batch.key not in files.planned]
        requests = sum(batch.requests for batch in batches)
        with Progress("batches", requests, unit="requests", meter=self.meter) as self._progress:
            for identity, sampler in files.samplers.items():
                if identity not in self._workers:
                    bought = partial(self._bought, sampler)
                    self._workers[identity] = _BatchWorker(
                        sampler, self.journal, self.table, self.settings.poll, bought
                    )
            for batch in lost:
                await self._workers[batch.identity].recover(batch)
            if not lost:
                await self._attend([await self._workers[b.identity].submit(b) for b in batches])

    def _bought(self, sampler: Sampler, reply: Reply) -> None:
        self._progress.advance(0, tokens=reply.tokens)
        if self.meter:
            self.meter.count(sampler, reply, batch=True)

    async def _attend(self, batches: Sequence[BatchJob]) -> None:
        """Look after batches until all are over."""
        waiting, seen = list(batches), Counter[str]()
        answered, problem, refused = 0, "", 0
        while waiting:
            for batch in list(waiting):
                worker = self._workers[batch.identity]
                state = await worker.look(batch)
                note = f"{len(waiting)} open, {state.status}"
                self._progress.advance(state.done - seen[batch.key], note=note)
                seen[batch.key] = state.done
                if state.over:
                    waiting.remove(batch)
                    more, why = await worker.settle(batch, state)
                    answered, problem = answered + more, problem or why
                    refused = max(refused, batch.requests if state.too_much else 0)
            if waiting and not self.settings.wait:
                raise PendingError(_pending(waiting))
            if waiting or problem:
                await asyncio.sleep(self.settings.poll)
        self._learn(answered, problem, refused, sum(batch.requests for batch in batches))

    def _learn(self, answered: int, problem: str, refused: int, requests: int) -> None:
        """Make batches smaller that the provider finds too large; give up what bears no fruit.

        Where others were answered that is a matter of these requests, all that are missing: they
        are asked one by one.
        """
        if answered:
            self._fruitless = 0
        elif refused > 1:
            self._most = refused // 2
        else:
            self._fruitless += 1
        if self._fruitless == _FRUITLESS and any(one.answered for one in self._workers.values()):
            self._one_by_one = True
            warn(
                f"{requests} requests have no answer after {_FRUITLESS} batches of their own "
                f"({problem}): they are asked one by one, at the full price.",
                stacklevel=2,
            )
        elif self._fruitless == _FRUITLESS:
            raise ServiceError(
                f"Batches come back without one answer ({problem}). Run without --batch, or "
                "later again: nothing is paid twice."
            )


class _BatchFiles:
    """Answers from the journal, and asks nobody: what is missing becomes lines of a file.

    A full file is a planned batch in the table. `samplers` are those asked, by identity, and
    `needed` the keys of all batches that must be over before another answer can be given, those
    `planned` here among them. Requests to a sampler that has no batches, or to any where
    all are to be asked `one_by_one`, are `others`. What is `rejected` is not asked for again.
    """

    def __init__(
        self,
        journal: Journal,
        table: BatchTable,
        most: int,
        rejected: Mapping[str, RejectedError],
        one_by_one: bool,
    ) -> None:
        """`most` requests go into one file, or fewer where the provider says so."""
        self.journal, self.table, self.most = journal, table, most
        self.rejected, self.one_by_one = rejected, one_by_one
        self.samplers: dict[str, Sampler] = {}
        self.needed: set[str] = set()
        self.planned: set[str] = set()
        self.others = 0
        self._files: dict[tuple[str, Sampling], _BatchFile] = {}

    async def fill(self, queries: "Dataset", teachers: Answerer, progress: Progress) -> None:
        """Write whatever answering these queries needs, as far as it can be known now."""
        columns = queries.select_columns(["query", "reference"])
        for batch in columns.iter(batch_size=_ROWS_AT_ONCE):
            for query, reference in zip(batch["query"], batch["reference"], strict=True):
                with suppress(InterruptedError, RequestError):
                    await teachers.answer(query, self, reference)
                progress.advance(1)
        for place in list(self._files):
            self._plan(place)

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """The journal's answer; raises `InterruptedError` for what waits for its batch."""
        key = request_digest(sampler.identity, messages, sampling)
        if known := self.journal.get(key):
            return known
        if rejected := self.journal.rejection(key) or self.rejected.get(key):
            raise rejected
        provider = _provider_of(sampler)
        if provider is not None:
            self.samplers[sampler.identity] = sampler
        if provider is None or self.one_by_one:
            self.others += 1
        elif found := self.table.batch_of(key):
            self.needed.add(found)
        else:
            line = provider.line(key, messages, sampling)
            self._add(key, line, (sampler.identity, sampling), provider)
        raise InterruptedError("waits for its batch")

    def _add(
        self, key: str, line: bytes, place: tuple[str, Sampling], provider: OpenAIBatches
    ) -> None:
        file = self._files.get(place)
        if file is not None and key in file.digests:
            return
        full = min(self.most, provider.most_requests)
        if file and (len(file.digests) >= full or file.size + len(line) > provider.most_bytes):
            self._plan(place)
            file = None
        if file is None:
            file = self._files[place] = _BatchFile(self.table.folder)
        file.add(key, line)

    def _plan(self, place: tuple[str, Sampling]) -> None:
        file = self._files.pop(place)
        file.lines.close()
        self.table.plan(file.key, *place, file.digests)
        self.needed.add(file.key)
        self.planned.add(file.key)


class _BatchFile:
    """Lines that will be one batch, under its key; `size` is in bytes."""

    def __init__(self, folder: Path) -> None:
        self.key, self.size = uuid4().hex, 0
        self.digests: set[str] = set()
        self.path = folder / f"{self.key}.jsonl"
        self.lines = self.path.open("wb")

    def add(self, key: str, line: bytes) -> None:
        try:
            self.lines.write(line)
        except OSError as error:
            raise OutputError(
                f"Can't write {str(self.path)!r}: {error}. Free some space, and run again."
            ) from error
        self.size += len(line)
        self.digests.add(key)


def _provider_of(sampler: Sampler) -> OpenAIBatches | None:
    """Whoever takes a sampler's requests in batches, if its provider does."""
    provider: OpenAIBatches | None = getattr(sampler, "batches", None)
    return provider


class _BatchWorker:
    """Handles one provider's batches; whatever it does can be done again after a crash.

    `rejected` has the requests that the provider rejects, by digest, as long as it has `answered`
    no other: they aren't final.
    """

    def __init__(
        self,
        sampler: Sampler,
        journal: Journal,
        table: BatchTable,
        rest: float,
        bought: Callable[[Reply], None],
    ) -> None:
        """`rest` seconds lie between two attempts at a call that failed; `bought` is told of every
        reply that is journaled.
        """
        provider = _provider_of(sampler)
        assert provider is not None
        self.provider, self.journal, self.table = provider, journal, table
        self.rest, self.bought = rest, bought
        self.rejected: dict[str, RejectedError] = {}
        self._unread: defaultdict[str, set[str]] = defaultdict(set)  # batches by request
        self.answered = False

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
        path = self.table.folder / f"{batch.key}.jsonl"
        try:
            name = await self._insist(lambda: self._start(batch.key, path))
        except RejectedError as error:
            self.table.close_batch(batch.key)
            raise ServiceError(f"The provider refuses a batch: {error}") from error
        self.table.note(batch.key, sent=True, name=name)
        path.unlink(missing_ok=True)
        return replace(batch, name=name)

    async def _start(self, key: str, path: Path) -> str:
        (batch,) = (one for one in self.table.open if one.key == key)
        # The answer to an earlier attempt may have been lost, and its batch cost money.
        if batch.sent and (name := await self.provider.find(key)):
            return name
        file = batch.file or await self.provider.upload(path)
        self.table.note(key, file=file)
        self.table.note(key, sent=True)
        return await self.provider.create(file, key)

    async def look(self, batch: BatchJob) -> BatchState:
        """How far a batch is."""
        name = batch.name
        assert name is not None
        return await self._insist(lambda: self.provider.look(name))

    async def settle(self, batch: BatchJob, state: BatchState) -> tuple[int, str]:
        """Journal all that a batch which is over has answered, and free its other requests.

        Returns how many of them were answered or rejected, and why the others were not. Raises
        what ends a run, such as `AccessError`, when all else is done, and `ServiceError` for a
        batch that was stopped.
        """
        answers, problem = list[Reply | DistillError](), ""
        digests = self.table.digests(batch.key)
        for file in state.files:
            try:
                answers += await self._insist(partial(self._read, file, batch, digests))
            except RejectedError as error:
                problem = f"its answers can't be had: {error}"
        if self.answered:
            for digest, rejection in self.rejected.items():
                self.journal.reject(digest, batch.identity, rejection)
            self.rejected.clear()
        self.table.close_batch(batch.key)
        others = [one for one in answers if not isinstance(one, Reply | RejectedError)]
        for one in others:
            if not isinstance(one, RequestError):
                raise one
        answered = len(answers) - len(others)
        _require_ended(batch, state, answered)
        missing = batch.requests - answered
        if not missing:
            return answered, ""
        said = problem or "".join(map(str, others[:1])) or state.problem
        default = f"{missing} requests of a batch that is {state.status} have no answer"
        return answered, said or default

    async def _read(
        self, file: str, batch: BatchJob, digests: frozenset[str]
    ) -> list[Reply | DistillError]:
        """What one of a batch's files says of each request; replies are journaled in any case."""
        answers, replies = list[Reply | DistillError](), list[tuple[str, Reply]]()
        try:
            async for line in self.provider.lines(file):
                digest, answer = self.provider.read(line, batch.sampling)
                if digest is not None and digest not in digests:
                    raise ServiceError(f"The batch {batch.name} answers what it was not asked.")
                if digest is None and isinstance(answer, Reply):
                    continue  # nobody knows to what
                answers.append(answer := self._given_up(batch, digest, answer))
                if isinstance(answer, Reply):
                    replies.append((str(digest), answer))
                elif isinstance(answer, RejectedError):
                    self.rejected[str(digest)] = answer
        finally:
            # A file is read again where its first reading broke off.
            new = [(key, reply) for key, reply in replies if self.journal.entry(key) is None]
            self.journal.put_all(batch.identity, new, batch=True)
            for _, reply in new:
                self.bought(reply)
            self.answered = self.answered or bool(replies)
        return answers

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

    async def _insist(self, make: Callable[[], Awaitable[T]]) -> T:
        """Try again what may succeed later: none of it is paid for twice."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return await make()
            except RetryableError as error:
                await asyncio.sleep(max(self.rest, error.retry_after or 0.0))
        return await make()


def _require_ended(batch: BatchJob, state: BatchState, answered: int) -> None:
    """Raises for a batch that was stopped."""
    if state.status == "cancelled":
        raise ServiceError(
            f"The batch {batch.name} was cancelled at the provider; the {answered} answers "
            "that it had are kept. Run again to have the others worked on."
        )
    if state.status == "failed" and not state.too_much:
        raise ServiceError(
            f"The batch {batch.name} failed at the provider: {state.problem or 'no reason given'}. "
            "Mend the cause and run again: nothing is paid twice."
        )
