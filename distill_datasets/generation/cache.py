"""Pay once: every answer is on disk before anything reads it."""

import asyncio
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from distill_datasets.errors import OutputError, RejectedError
from distill_datasets.models.sampler import Reply

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    digest TEXT NOT NULL PRIMARY KEY,
    model TEXT NOT NULL,
    reply TEXT NOT NULL,
    bought_at REAL NOT NULL,
    times_bought INTEGER NOT NULL DEFAULT 1
)
"""
_REJECTIONS = """
CREATE TABLE IF NOT EXISTS rejections (
    digest TEXT NOT NULL PRIMARY KEY,
    model TEXT NOT NULL,
    type TEXT NOT NULL,
    status INTEGER,
    message TEXT NOT NULL,
    rejected_at REAL NOT NULL
)
"""
# Answers out of a provider's batches have a price of their own.
_BATCHED = "CREATE TABLE IF NOT EXISTS batch_answers (digest TEXT NOT NULL PRIMARY KEY)"
_REJECT = """
INSERT OR IGNORE INTO rejections (digest, model, type, status, message, rejected_at)
VALUES (?, ?, ?, ?, ?, ?)
"""
_PUT = """
INSERT INTO answers (digest, model, reply, bought_at) VALUES (?, ?, ?, ?)
ON CONFLICT (digest) DO UPDATE SET
    reply = CASE WHEN times_bought = 0 THEN excluded.reply ELSE reply END,
    times_bought = times_bought + 1
"""
_ADD = """
INSERT OR IGNORE INTO answers (digest, model, reply, bought_at, times_bought)
VALUES (?, ?, ?, ?, 0)
"""
_Entry = tuple[str, str, str]


class Journal:
    """Raw answers keyed by request digest, in SQLite with a write-ahead log.

    Several processes may hold the same file. An answer is committed when `put` returns, so it
    outlives a killed process. The first answer of a digest that was bought stays; a later one only
    counts up `times_bought`, which is how double payment shows.
    """

    def __init__(self, path: Path, *, bought_only: bool = False) -> None:
        """Open or create the file; raises `OutputError` where it can't be written.

        With `bought_only`, answers that were paid for elsewhere are not found.
        """
        self.path = path
        self._least = 1 if bought_only else 0
        self._coming: list[tuple[tuple[Any, ...], asyncio.Future[None]]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One connection serves the event loop's thread and the caller's, never both at once.
            self._database = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            # With a write-ahead log, NORMAL loses nothing when the process dies.
            self._database.execute("PRAGMA synchronous = NORMAL")
            # Moving pages from the log into the file waits for the disk: seldom, 40 MB at once.
            self._database.execute("PRAGMA wal_autocheckpoint = 10000")
            self._database.execute(_TABLE)
            self._database.execute(_REJECTIONS)
            self._any_rejected = bool(self._one("SELECT EXISTS (SELECT 1 FROM rejections)")[0])
            self._database.execute(_BATCHED)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(_unwritable(path, error)) from error

    def get(self, digest: str) -> Reply | None:
        """The answer already paid for, if any."""
        row = self._database.execute(
            "SELECT reply FROM answers WHERE digest = ? AND times_bought >= ?",
            (digest, self._least),
        ).fetchone()
        return None if row is None else Reply.from_json(row[0])

    def put(self, digest: str, model: str, reply: Reply, *, batch: bool = False) -> None:
        """Store an answer, bought alone or in a `batch`; raises `OutputError` for a full disk."""
        try:
            if batch:
                self._database.execute("INSERT OR IGNORE INTO batch_answers VALUES (?)", (digest,))
            self._database.execute(_PUT, (digest, model, reply.to_json(), time.time()))
        except sqlite3.Error as error:
            raise OutputError(_unwritable(self.path, error)) from error

    async def put_together(self, digest: str, model: str, reply: Reply) -> None:
        """As `put`, in one transaction with all that comes in the same turn of the event loop."""
        loop = asyncio.get_running_loop()
        if not self._coming:
            loop.call_soon(self._put_coming)
        kept: asyncio.Future[None] = loop.create_future()
        self._coming.append(((digest, model, reply.to_json(), time.time()), kept))
        await kept

    def _put_coming(self) -> None:
        coming, self._coming = self._coming, []
        problem: OutputError | None = None
        try:
            self._transact(_PUT, [row for row, _ in coming])
        except sqlite3.Error as error:
            problem = OutputError(_unwritable(self.path, error))
        for _, kept in coming:
            if kept.done():
                continue
            if problem is None:
                kept.set_result(None)
            else:
                kept.set_exception(problem)

    def _transact(self, statement: str, rows: list[tuple[Any, ...]]) -> int:
        """All or none; how many rows were changed."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            changed = self._database.executemany(statement, rows).rowcount
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        return changed

    def reject(
        self, digest: str, model: str, *, type: str, status: int | None, message: str
    ) -> None:
        """Remember that a request will never be answered; raises `OutputError` like `put`."""
        try:
            self._database.execute(_REJECT, (digest, model, type, status, message, time.time()))
            self._any_rejected = True
        except sqlite3.Error as error:
            raise OutputError(_unwritable(self.path, error)) from error

    def rejection(self, digest: str) -> RejectedError | None:
        """Why a request will never be answered, if that was known when the journal was opened."""
        if not self._any_rejected:
            return None
        row = self._database.execute(
            "SELECT type, status, message FROM rejections WHERE digest = ?", (digest,)
        ).fetchone()
        return None if row is None else RejectedError(row[2], type=row[0], status=row[1])

    def entry(self, digest: str) -> _Entry | None:
        """What is stored for a digest: the digest, the sampler's identity, the reply's JSON."""
        found: _Entry | None = self._database.execute(
            "SELECT digest, model, reply FROM answers WHERE digest = ?", (digest,)
        ).fetchone()
        return found

    def add(self, entries: Iterable[_Entry]) -> int:
        """Store entries that were paid for elsewhere, all or none, bought zero times here.

        An answer that is there already stays. Returns how many were new.
        """
        now = time.time()
        rows = [(*entry, now) for entry in entries]
        try:
            return self._transact(_ADD, rows)
        except sqlite3.Error as error:
            raise OutputError(_unwritable(self.path, error)) from error

    def __len__(self) -> int:
        """How many different requests have been answered."""
        return int(self._one("SELECT count(*) FROM answers")[0])

    def _one(self, statement: str) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self._database.execute(statement).fetchone()
        return found

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Every digest with the number of times it was bought."""
        yield from self._database.execute("SELECT digest, times_bought FROM answers")

    def bought(self) -> Iterator[tuple[str, int, str, bool]]:
        """Every answer that was paid for here: identity, how often, the JSON, if in a batch."""
        rows = self._database.execute(
            "SELECT model, times_bought, reply, batch_answers.digest IS NOT NULL"
            " FROM answers LEFT JOIN batch_answers USING (digest) WHERE times_bought > 0"
        )
        yield from ((model, times, reply, bool(batch)) for model, times, reply, batch in rows)

    def first_tokens(self) -> list[float]:
        """Seconds to the first token of every answer that was streamed here, the least first."""
        rows = self._database.execute(
            "SELECT json_extract(reply, '$.first_token_seconds') AS seconds"
            " FROM answers WHERE times_bought > 0 AND seconds IS NOT NULL ORDER BY seconds"
        )
        return [seconds for (seconds,) in rows]

    def in_batch(self, digest: str) -> bool:
        """Whether an answer came out of a provider's batch."""
        found = self._database.execute("SELECT 1 FROM batch_answers WHERE digest = ?", (digest,))
        return found.fetchone() is not None

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def _unwritable(path: Path, error: Exception) -> str:
    return (
        f"Can't write the journal {str(path)!r}: {error}. "
        "Answers are only asked for when they can be kept: choose a folder that is writable "
        "and has space, and run again."
    )
