"""Pay once: every answer is on disk before anything reads it."""

import asyncio
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Self

from distill_datasets.errors import OutputError, RejectedError
from distill_datasets.files import sync_folder
from distill_datasets.models.sampler import Reply

_FORMAT = 1  # version 0.1 of the package wrote the same tables, and format 0
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    digest TEXT NOT NULL PRIMARY KEY,
    model TEXT NOT NULL,
    reply TEXT NOT NULL,
    bought_at REAL NOT NULL,
    times_bought INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE IF NOT EXISTS rejections (
    digest TEXT NOT NULL PRIMARY KEY,
    model TEXT NOT NULL,
    type TEXT NOT NULL,
    status INTEGER,
    message TEXT NOT NULL,
    rejected_at REAL NOT NULL
);
-- Answers out of a provider's batches have a price of their own.
CREATE TABLE IF NOT EXISTS batch_answers (digest TEXT NOT NULL PRIMARY KEY);
"""
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
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_MISSES = 10_000  # unreadable rows in a row: nothing comes after them
_Entry = tuple[str, str, str]


class Journal:
    """Raw answers keyed by request digest, in SQLite with a write-ahead log.

    Several processes may hold the same file. An answer is on disk when `put` or `store` returns,
    so that it outlives a killed process and a power loss. The first answer of a digest that was
    bought stays; a later one only counts up `times_bought`, which is how double payment shows.
    """

    def __init__(self, path: Path, *, bought_only: bool = False) -> None:
        """Open or create the file; of a damaged one all that can be read goes into a new one.

        With `bought_only`, answers that were paid for elsewhere are not found. Raises
        `OutputError` where it can't be written, or is of a later version of the package.
        """
        self.path = path
        self._least = 1 if bought_only else 0
        self._coming: list[tuple[tuple[Any, ...], asyncio.Future[None]]] = []
        self._written: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None
        self._log: int | None = None
        self._thread = ThreadPoolExecutor(1)
        self._unreadable = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._database = self._open()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", None) not in _DAMAGED:
                    raise
                _mend(path)
                self._database = self._open()
            found = self._database.execute("SELECT EXISTS (SELECT 1 FROM rejections)")
            self._any_rejected = bool(found.fetchone()[0])
        except OutputError:
            raise
        except (OSError, sqlite3.Error) as error:
            raise OutputError(_unwritable(path, error)) from error

    def _open(self) -> sqlite3.Connection:
        # One connection serves the event loop's thread and the caller's, never both at once.
        database = sqlite3.connect(
            self.path, timeout=60, isolation_level=None, check_same_thread=False
        )
        with ExitStack() as unopened:
            unopened.callback(database.close)
            database.execute("PRAGMA journal_mode = WAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > _FORMAT:
                raise OutputError(
                    f"{str(self.path)!r} was written by a later version of distill-datasets "
                    f"(format {version}, this one knows {_FORMAT}). Upgrade, or choose another "
                    "folder."
                )
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                damage = sqlite3.DatabaseError(found)
                damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
                raise damage
            database.executescript(_TABLES)
            if version < _FORMAT:
                database.execute(f"PRAGMA user_version = {_FORMAT}")
            # With a write-ahead log, NORMAL loses nothing when the process dies; what a power
            # loss must not take is waited for by `_sync`, outside the event loop's thread.
            database.execute("PRAGMA synchronous = NORMAL")
            # Moving pages from the log into the file waits for the disk: seldom, 40 MB at once.
            database.execute("PRAGMA wal_autocheckpoint = 10000")
            unopened.pop_all()
        return database

    def get(self, digest: str) -> Reply | None:
        """The answer already paid for, if any; one that can't be read is forgotten."""
        try:
            row = self._database.execute(
                "SELECT reply FROM answers WHERE digest = ? AND times_bought >= ?",
                (digest, self._least),
            ).fetchone()
            return None if row is None else Reply.from_json(row[0])
        except (sqlite3.OperationalError, ValueError, LookupError, TypeError, AttributeError):
            self._database.execute("DELETE FROM answers WHERE digest = ?", (digest,))
            if not self._unreadable:
                _say(f"{self.path} holds an answer that can't be read: such rows are asked again.")
            self._unreadable += 1
            return None

    def put(self, digest: str, model: str, reply: Reply, *, batch: bool = False) -> None:
        """Store an answer, bought alone or in a `batch`; raises `OutputError` for a full disk."""
        self.put_all(model, [(digest, reply)], batch=batch)

    def put_all(
        self, model: str, replies: Sequence[tuple[str, Reply]], *, batch: bool = False
    ) -> None:
        """Store answers of one sampler by their digests, all or none, as `put` does."""
        now = time.time()
        rows = [(digest, model, reply.to_json(), now) for digest, reply in replies]
        try:
            if batch:
                marks = [(digest,) for digest, _ in replies]
                _transact(self._database, "INSERT OR IGNORE INTO batch_answers VALUES (?)", marks)
            _transact(self._database, _PUT, rows)
        except sqlite3.Error as error:
            raise OutputError(_unwritable(self.path, error)) from error
        if problem := self._sync():
            raise problem

    async def store(self, digest: str, model: str, reply: Reply) -> None:
        """As `put`, in one transaction with all that comes in the same turn of the event loop.

        It is in the log by the next turn, where it outlives a killed process. A thread waits for
        the disk, once for all that was written until it is free. What can't be stored is an error
        of its own, and keeps nothing else from the disk.
        """
        loop = asyncio.get_running_loop()
        if not self._coming:
            loop.call_soon(self._write_coming)
        stored: asyncio.Future[None] = loop.create_future()
        self._coming.append(((digest, model, reply.to_json(), time.time()), stored))
        await stored

    def _write_coming(self) -> None:
        coming, self._coming = self._coming, []
        problems = self._write([row for row, _ in coming])
        for (_, stored), problem in zip(coming, problems, strict=True):
            if problem is None:
                self._written.append(stored)
            elif not stored.done():
                stored.set_exception(problem)
        if self._written and (self._syncing is None or self._syncing.done()):
            self._syncing = asyncio.get_running_loop().create_task(self._sync_written())

    async def _sync_written(self) -> None:
        loop = asyncio.get_running_loop()
        while self._written:
            written, self._written = self._written, []
            problem = await loop.run_in_executor(self._thread, self._sync)
            for stored in written:
                if not stored.done():
                    stored.set_exception(problem) if problem else stored.set_result(None)

    def _sync(self) -> OutputError | None:
        """Wait until all that was written is on disk; what went wrong."""
        try:
            if self._log is None:
                self._log = os.open(f"{self.path}-wal", os.O_RDWR)
                sync_folder(self.path.parent)
            os.fsync(self._log)
        except OSError as error:
            return OutputError(_unwritable(self.path, error))
        return None

    def _write(self, rows: Sequence[tuple[Any, ...]]) -> list[Exception | None]:
        """Put rows into the log, one by one where they don't go together; what failed of each."""
        try:
            _transact(self._database, _PUT, rows)
            return [None] * len(rows)
        except sqlite3.Error as error:
            failed: Exception = OutputError(_unwritable(self.path, error))
        except ValueError as error:
            failed = error
        if len(rows) == 1:
            return [failed]
        return [problem for row in rows for problem in self._write([row])]

    def reject(self, digest: str, model: str, error: RejectedError) -> None:
        """Remember that a request will never be answered; raises `OutputError` like `put`."""
        said = str(error).encode(errors="replace").decode()
        row = (digest, model, error.type, error.status, said, time.time())
        try:
            self._database.execute(_REJECT, row)
            self._any_rejected = True
        except sqlite3.Error as problem:
            raise OutputError(_unwritable(self.path, problem)) from problem

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
            "SELECT digest, model, reply FROM answers WHERE digest = ? AND json_valid(reply)",
            (digest,),
        ).fetchone()
        return found

    def add(self, entries: Iterable[_Entry]) -> int:
        """Store entries that were paid for elsewhere, all or none, bought zero times here.

        An answer that is there already stays. Returns how many were new.
        """
        now = time.time()
        rows = [(*entry, now) for entry in entries]
        try:
            return _transact(self._database, _ADD, rows)
        except sqlite3.Error as error:
            raise OutputError(_unwritable(self.path, error)) from error

    def __len__(self) -> int:
        """How many different requests have been answered."""
        return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Every digest with the number of times it was bought."""
        yield from self._database.execute("SELECT digest, times_bought FROM answers")

    def bought(self) -> Iterator[tuple[str, int, str, bool]]:
        """Every answer that was paid for here: identity, how often, the JSON, if in a batch."""
        rows = self._database.execute(
            "SELECT model, times_bought, reply, batch_answers.digest IS NOT NULL"
            " FROM answers LEFT JOIN batch_answers USING (digest)"
            " WHERE times_bought > 0 AND json_valid(reply)"
        )
        yield from ((model, times, reply, bool(batch)) for model, times, reply, batch in rows)

    def first_tokens(self) -> list[float]:
        """Seconds to the first token of every answer that was streamed here, the least first."""
        rows = self._database.execute(
            "SELECT json_extract(reply, '$.first_token_seconds') AS seconds FROM answers"
            " WHERE times_bought > 0 AND json_valid(reply) AND seconds IS NOT NULL ORDER BY seconds"
        )
        return [seconds for (seconds,) in rows]

    def in_batch(self, digest: str) -> bool:
        """Whether an answer came out of a provider's batch."""
        found = self._database.execute("SELECT 1 FROM batch_answers WHERE digest = ?", (digest,))
        return found.fetchone() is not None

    def close(self) -> None:
        """Release the file; first comes what nobody waited for until it was stored."""
        self._thread.shutdown()
        if self._coming or self._written:
            self._write([row for row, _ in self._coming])
            self._sync()
        if self._log is not None:
            os.close(self._log)
        self._database.close()

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def _transact(database: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    """All or none; how many rows were changed."""
    with database:
        database.execute("BEGIN IMMEDIATE")
        return database.executemany(statement, rows).rowcount


def _mend(path: Path) -> None:
    """Put whatever can be read of a damaged journal into its place, and the damaged one aside."""
    mended, aside = path.with_name(f"{path.name}.mended"), path.with_name(f"{path.name}.damaged")
    mended.unlink(missing_ok=True)
    _fill_up(path)
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as old,
        closing(sqlite3.connect(mended, isolation_level=None)) as new,
    ):
        try:
            tables = old.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL"
            ).fetchall()
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"Expected a journal of answers in {str(path)!r}, found what nobody can read "
                f"({error}). Put a copy in its place, or move it away to buy every answer again."
            ) from error
        new.execute("BEGIN")
        for name, sql in tables:
            new.execute(sql)
            for row in _readable(old, name):
                places = ", ".join("?" * len(row))
                new.execute(f"INSERT OR IGNORE INTO {name} VALUES ({places})", row)  # noqa: S608
        new.execute("COMMIT")
        new.executescript(_TABLES)
        new.execute("DELETE FROM answers WHERE NOT json_valid(reply)")
        saved = new.execute("SELECT count(*) FROM answers").fetchone()[0]
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            Path(f"{path}{end}").replace(f"{aside}{end}")
    mended.replace(path)
    sync_folder(path.parent)
    _say(
        f"{path} was damaged: {saved:,} answers were saved, the others are asked again. The "
        f"damaged file is {aside.name}."
    )


def _fill_up(path: Path) -> None:
    """Let a file be as long as it says: SQLite reads nothing of one that lost its end."""
    with path.open("r+b") as file:
        head = file.read(32)
        size = int.from_bytes(head[16:18], "big")
        length = int.from_bytes(head[28:32], "big") * (65536 if size == 1 else size)
        if head.startswith(b"SQLite format 3\0") and path.stat().st_size < length:
            file.truncate(length)


def _readable(database: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, past those that can't be read."""
    last, misses = 0, 0
    while misses < _MISSES:
        # All rows in their order; after one that can't be read, the next one that can.
        scanning = not misses
        where = f"> {last}" if scanning else f"= {last + misses}"
        try:
            for rowid, *row in database.execute(
                f"SELECT rowid, * FROM {table} WHERE rowid {where} ORDER BY rowid"  # noqa: S608
            ):
                last, misses = rowid, 0
                yield tuple(row)
            if scanning:
                return
            misses = misses and misses + 1
        except sqlite3.DatabaseError:
            misses += 1


def _say(sentence: str) -> None:
    print(f"journal: {sentence}", file=sys.stderr)


def _unwritable(path: Path, error: Exception) -> str:
    return (
        f"Can't write the journal {str(path)!r}: {error}. "
        "Answers are only asked for when they can be kept: choose a folder that is writable "
        "and has space, and run again."
    )
