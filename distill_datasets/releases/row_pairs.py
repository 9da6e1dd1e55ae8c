"""The rows of two releases side by side, matched on disk so that their number doesn't matter."""

import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from distill_datasets.errors import DatasetError, OutputError
from distill_datasets.releases.contents import REJECTED, published_contents
from distill_datasets.schema import failure_content

if TYPE_CHECKING:
    import pyarrow as pa

OLD, NEW = "old", "new"
# What makes a row another one. `messages` is made of query and response; token counts depend on
# the teacher's cache.
_CONTENT = (
    *("query", "response", "answer", "reference", "group"),
    *("teacher", "raw", "rejection", "error"),
    *("candidates", "agreement", "score"),
)
_COUNTS = ("teacher_prompt_tokens", "teacher_cached_tokens", "teacher_response_tokens")
_TABLE = """
CREATE TABLE {side} (
    id TEXT, sample INTEGER, part TEXT, answer TEXT, content BLOB, counts BLOB,
    prompt_tokens INTEGER, response_tokens INTEGER, response_characters INTEGER,
    PRIMARY KEY (id, sample)
) WITHOUT ROWID
"""
# A row that is in two splits is read twice.
_INSERT = """
INSERT INTO {side} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET part = part || '+' || excluded.part
"""


class RowPairs:
    """Rows of an old and a new release by id and sample, in a temporary database on disk.

    Close it after use, or use it as a context. Costs about 200 bytes of disk a row.
    """

    def __init__(self, old: Path, new: Path) -> None:
        """Read both folders once; raises `DatasetError` for rows that no release has."""
        with _room():
            # An empty name is a file that SQLite removes when the connection closes.
            self._database = sqlite3.connect("", isolation_level=None)
            self._database.execute("PRAGMA synchronous = OFF")
            for side, folder in ((OLD, old), (NEW, new)):
                self._database.execute(_TABLE.format(side=side))
                self._database.execute("BEGIN")
                self._database.executemany(_INSERT.format(side=side), _records(folder))
                self._database.execute("COMMIT")

    def counts(self) -> dict[str, int]:
        """Rows added, removed, changed, and the same but for the teacher's token counts."""
        both = f"{OLD} JOIN {NEW} USING (id, sample)"
        [total_old], [total_new], [common, changed, recounted] = (
            self._query(f"SELECT count(*) FROM {OLD}")[0],
            self._query(f"SELECT count(*) FROM {NEW}")[0],
            self._query(
                "SELECT count(*), coalesce(sum(changed), 0), "
                "coalesce(sum(NOT changed AND recounted), 0) FROM (SELECT "
                "old.content != new.content OR old.part != new.part AS changed, "
                f"old.counts != new.counts AS recounted FROM {both})"
            )[0],
        )
        return {
            "old": total_old,
            "new": total_new,
            "added": total_new - common,
            "removed": total_old - common,
            "changed": changed,
            "recounted": recounted,
        }

    def changed_columns(self) -> dict[str, int]:
        """In how many rows each column changed, the most frequent first."""
        found: Counter[str] = Counter()
        with _room():
            for old, new in self._database.execute(
                f"SELECT old.content, new.content FROM {OLD} JOIN {NEW} USING (id, sample) "
                "WHERE old.content != new.content"
            ):
                pairs = zip(_CONTENT, _numbers(old), _numbers(new), strict=True)
                found.update(name for name, before, after in pairs if before != after)
        return dict(found.most_common())

    def movements(self, column: str) -> list[tuple[str | None, str | None, int]]:
        """From what to what the `part` or the `answer` of a row went, and how often."""
        return self._query(
            f"SELECT old.{column}, new.{column}, count(*) FROM {OLD} JOIN {NEW} USING (id, sample) "
            f"WHERE old.{column} IS NOT new.{column} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
        )

    def distribution(self, side: str, column: str) -> list[tuple[int, int]]:
        """Every value of a number in the kept rows of a side, with how many rows have it."""
        return self._query(
            f"SELECT {column}, count(*) FROM {side} WHERE part != '{REJECTED}' "
            f"AND {column} IS NOT NULL GROUP BY 1 ORDER BY 1"
        )

    def _query(self, statement: str) -> list[Any]:
        with _room():
            return self._database.execute(statement).fetchall()

    def __enter__(self) -> Self:
        """The pairs themselves."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the disk back."""
        self._database.close()


def _records(release: Path) -> Iterator[tuple[Any, ...]]:
    for (part,), rows in published_contents(release):
        if missing := {"id", "sample"} - set(rows.column_names):
            raise DatasetError(
                f"The rows of {str(release)!r} have no {sorted(missing)}: expected the columns "
                f"of a release, found {rows.column_names}. Compare two releases."
            )
        ids, samples, answers, responses = _columns(rows, ("id", "sample", "answer", "response"))
        contents, counts = _columns(rows, _CONTENT), _columns(rows, _COUNTS)
        yield from zip(
            ids,
            samples,
            [part] * len(rows),
            answers,
            map(_hashes, zip(*contents, strict=True)),
            map(_hashes, zip(*counts, strict=True)),
            counts[0],
            counts[2],
            [None if response is None else len(response) for response in responses],
            strict=True,
        )


def _columns(rows: "pa.Table", names: Sequence[str]) -> list[list[Any]]:
    present = set(rows.column_names)
    columns = [rows[n].to_pylist() if n in present else [None] * len(rows) for n in names]
    return [
        list(map(failure_content, column)) if name == "error" else column
        for name, column in zip(names, columns, strict=True)
    ]


def _hashes(values: tuple[Any, ...]) -> bytes:
    # Python's own hashes differ between processes, and these never leave this one.
    return struct.pack(f"{len(values)}q", *map(hash, values))


def _numbers(hashes: bytes) -> tuple[int, ...]:
    return struct.unpack(f"{len(hashes) // 8}q", hashes)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(
            f"The rows can't be compared: {error}. They are matched in a temporary file: free "
            "some space, or set SQLITE_TMPDIR to a folder that has it."
        ) from error
