"""Pay once for scores too: what a teacher thinks of a text is on disk before anything learns it."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distill_datasets.errors import OutputError
from distill_datasets.models.scoring import SoftLabels

_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
    digest TEXT NOT NULL PRIMARY KEY,
    tokens BLOB NOT NULL,
    ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    kept REAL NOT NULL
)
"""


class ScoreStore:
    """Soft labels by the digest of what was scored: the tokens as int32, logarithms as float16."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises `OutputError` where it can't be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def __contains__(self, digest: str) -> bool:
        """Whether it was scored before."""
        asked = "SELECT 1 FROM scores WHERE digest = ?"
        return self._database.execute(asked, (digest,)).fetchone() is not None

    def get(self, digest: str) -> SoftLabels:
        """What was scored before; `KeyError` where nothing was."""
        row = self._database.execute(
            "SELECT tokens, ids, logprobs, kept FROM scores WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None:
            raise KeyError(digest)
        tokens = np.frombuffer(row[0], "<i4")
        shape = (len(tokens), -1)
        ids, logprobs = np.frombuffer(row[1], "<i4"), np.frombuffer(row[2], "<f2")
        return SoftLabels(tokens, ids.reshape(shape), logprobs.reshape(shape), row[3])

    def put(self, entries: Iterable[tuple[str, SoftLabels]]) -> None:
        """Keep them all or none; raises `OutputError` when the disk won't take it."""
        rows = [
            (
                digest,
                labels.tokens.astype("<i4").tobytes(),
                labels.ids.astype("<i4").tobytes(),
                labels.logprobs.astype("<f2").tobytes(),
                labels.kept,
            )
            for digest, labels in entries
        ]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def _unwritable(self, error: Exception) -> OutputError:
        return OutputError(
            f"Can't write the scores {str(self.path)!r}: {error}. Free some space or choose "
            "another --out, and run again: what is stored is not paid again."
        )
