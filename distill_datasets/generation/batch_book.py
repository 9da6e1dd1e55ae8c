"""Which requests lie in which of a provider's batches, on disk before anything is sent."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from distill_datasets.errors import OutputError
from distill_datasets.models.batches import Batch
from distill_datasets.models.sampler import Sampling

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


class BatchBook:
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

    def upload(self, key: str, file: str) -> None:
        """The provider has the requests, under this name."""
        self._change("UPDATE batches SET file = ? WHERE key = ?", file, key)

    def send(self, key: str) -> None:
        """From now on the provider may be working on it."""
        self._change("UPDATE batches SET sent = 1 WHERE key = ?", key)

    def start(self, key: str, name: str) -> None:
        """The provider works on it, under this name."""
        self._change("UPDATE batches SET sent = 1, name = ? WHERE key = ?", name, key)

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
    def open(self) -> list[Batch]:
        """Every batch that is not over, the oldest first."""
        rows = self._database.execute(
            "SELECT key, identity, sampling, requests, file, sent, name FROM batches"
            " WHERE NOT closed ORDER BY planned_at, key"
        )
        return [
            Batch(key, identity, _sampling(text), requests, file, bool(sent), name)
            for key, identity, text, requests, file, sent, name in rows
        ]

    def _change(self, statement: str, *values: str) -> None:
        with _kept(self.path):
            self._database.execute(statement, values)

    @contextmanager
    def _together(self) -> Iterator[None]:
        with _kept(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                self._database.execute("ROLLBACK")
                raise

    def __enter__(self) -> Self:
        """The book itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the file."""
        self._database.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder's batches for one process; raises `OutputError` where another has them.

    A killed process lets go of them by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # SQLite locks files in the same way on every system.
    with closing(sqlite3.connect(folder / "lock.sqlite", timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"Another process has the batches in {str(folder)!r} in hand ({error}). Wait for "
                "it, or end it: two would pay for the same requests."
            ) from error
        yield


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
