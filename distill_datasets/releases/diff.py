"""What changed between two releases: rows, labels, lengths, recipe and prompt.

A row is known by its id and sample. It changed where its content or its split did; other token
counts of the teacher are no change, since they depend on what its server had in its cache.
"""

import difflib
import json
import sqlite3
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from distill_datasets.errors import DatasetError, OutputError
from distill_datasets.hub.references import Pinned, find_release
from distill_datasets.parquet import open_parquet, read_batches
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.manifest import (
    REJECTED,
    RowChanges,
    changed_keys,
    flat,
    read_manifest,
    rejected_rows,
)
from distill_datasets.schema import EARLIER, SOURCE, failure_content
from distill_datasets.tables import aligned, html_card, html_preformatted, html_table, shortened

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

FINGERPRINTS = "fingerprints.parquet"
_HASHES = ("key", "content", "answer", "counts")
# What makes a row another one; `messages` is made of query and response.
_CONTENT = (
    *("query", "response", "answer", "reference", "group"),
    *("teacher", "raw", "rejection", "error"),
    *("candidates", "agreement", "score"),
)
# Columns that few recipes have, and that are content where they hold anything.
_ADDED = (EARLIER, SOURCE)
_COMPARED = (*_CONTENT, *_ADDED)
_COUNTS = ("teacher_prompt_tokens", "teacher_cached_tokens", "teacher_response_tokens")
_LENGTHS = ("prompt_tokens", "response_tokens", "response_characters")
_SIDES = ("old", "new")
_MOST = 20  # movements that are listed one by one
_WIDEST = 40
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
_BOTH = "old JOIN new USING (id, sample)"


@dataclass(frozen=True)
class Difference:
    """Of two releases; `data` is made of what JSON has."""

    data: Mapping[str, Any]

    @property
    def empty(self) -> bool:
        """Whether rows and recipe are the same."""
        digests = {self.data[side]["content_digest"] for side in _SIDES}
        return len(digests) == 1 and not self.data["recipe"]["keys"]

    def text(self) -> str:
        """For a terminal."""
        return "\n".join(_lines(self.data)) + "\n"

    def _repr_html_(self) -> str:
        rows, sides = self.data["rows"], [self.data[side]["version"] for side in _SIDES]
        counts = {name: rows[name] for name in ("added", "removed", "changed")}
        said = "Nothing changed" if self.empty else "Changed"
        return html_card(
            f"{said}: {sides[0]} to {sides[1]}",
            html_table(counts.items(), ["rows", ""]),
            html_preformatted(self.text()),
        )


def diff(old: Path | str, new: Path | str, *, config: str | None = None) -> Difference:
    """Compare two releases: folders, or Hub datasets such as `me/name@v1.0.0`.

    `config` names one of several releases in one repository. Reads both releases once, and holds
    no more than a few thousand rows at a time. Raises `DatasetError` for what is no release.
    """
    before, after = _find(old, config), _find(new, config)
    recipes = load_recipe(before.path, trust=True), load_recipe(after.path, trust=True)
    sides = {"old": _facts(old, before), "new": _facts(new, after)}
    with _RowPairs(before.path, after.path) as pairs:
        data = {
            **sides,
            "rows": pairs.counts(),
            "changed_columns": pairs.changed_columns(),
            "moved": pairs.movements("part"),
            "labels": pairs.movements("answer"),
            "lengths": {name: pairs.lengths(name) for name in _LENGTHS},
            "recipe": _recipes(*recipes),
        }
    return Difference(data)


def published_rows(release: Path) -> Iterator[tuple[str, "pa.Table"]]:
    """The rows of a release's folder with the name of their split, or `rejected`."""
    import pyarrow as pa

    for path in sorted([*release.glob("data/*.parquet"), *release.glob("rejected/*.parquet")]):
        for batch in read_batches(path):
            yield path.name.split("-")[0], pa.Table.from_batches([batch])


class Fingerprints:
    """Hashes of a release's rows, 32 bytes a row, by which two releases are told apart."""

    def __init__(self) -> None:
        self._hashes = {name: array("Q") for name in _HASHES}

    def add(self, parts: Sequence[str], row: Mapping[str, Any]) -> None:
        """Note a row that is in these parts."""
        added = [_value(name, row[name]) for name in _ADDED if row.get(name)]
        content = json_line([*(_value(name, row.get(name)) for name in _CONTENT), *added])
        placed = 0
        for part in parts:
            placed ^= short_hash(part.encode() + b"\n" + content)
        self._hashes["key"].append(short_hash(f"{row['id']}\n{row['sample']}".encode()))
        self._hashes["content"].append(placed)
        self._hashes["answer"].append(short_hash((row.get("response") or "").encode()))
        self._hashes["counts"].append(short_hash(json_line([row.get(name) for name in _COUNTS])))

    def write(self, path: Path) -> None:
        """As a Parquet file, ordered by key: equal rows make equal files, whatever their order."""
        import pyarrow as pa
        from pyarrow.parquet import write_table

        table = pa.table(dict(zip(_HASHES, self._sorted(), strict=True)))
        write_table(table, path, use_dictionary=False, compression="none")

    def changes(self, new: "Fingerprints") -> RowChanges:
        """What `new` has otherwise."""
        import numpy as np

        keys, rows, answers, counts = self._sorted()
        new_keys, new_rows, new_answers, new_counts = new._sorted()
        _, here, there = np.intersect1d(keys, new_keys, assume_unique=True, return_indices=True)
        changed = rows[here] != new_rows[there]
        return RowChanges(
            added=len(new_keys) - len(there),
            removed=len(keys) - len(here),
            changed=int(changed.sum()),
            answers=int((changed & (answers[here] != new_answers[there])).sum()),
            recounted=int((~changed & (counts[here] != new_counts[there])).sum()),
        )

    def _sorted(self) -> "tuple[Hashes, Hashes, Hashes, Hashes]":
        """By key, each once: a row that came once for each of its parts is put together."""
        import numpy as np

        keys, rows, answers, counts = (
            np.frombuffer(self._hashes[name], dtype=np.uint64) for name in _HASHES
        )
        order = np.argsort(keys, kind="stable")
        keys, rows, answers, counts = keys[order], rows[order], answers[order], counts[order]
        if not len(keys):
            return keys, rows, answers, counts
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return keys[first], np.bitwise_xor.reduceat(rows, first), answers[first], counts[first]


def fingerprints_of(release: Path) -> Fingerprints:
    """The fingerprints in a release's folder, else those of its rows."""
    path, found = release / FINGERPRINTS, Fingerprints()
    if has_fingerprints(path):
        for batch in read_batches(path, _HASHES):
            for name in _HASHES:
                found._hashes[name].frombytes(batch[name].to_numpy().tobytes())
        return found
    for part, rows in published_rows(release):
        for row in rows.to_pylist():
            found.add((part,), row)
    return found


def has_fingerprints(path: Path) -> bool:
    """Whether a file holds fingerprints; those of version 0.1 told rows apart in another way."""
    return path.is_file() and set(_HASHES) <= set(open_parquet(path).schema_arrow.names)


class _RowPairs:
    """Rows of an old and a new release by id and sample, in a temporary database on disk.

    A context. Costs about 200 bytes of disk a row.
    """

    def __init__(self, old: Path, new: Path) -> None:
        with _room():
            # An empty name is a file that SQLite removes when the connection closes.
            self._database = sqlite3.connect("", isolation_level=None)
            self._database.execute("PRAGMA synchronous = OFF")
            for side, folder in (("old", old), ("new", new)):
                self._database.execute(_TABLE.format(side=side))
                self._database.execute("BEGIN")
                self._database.executemany(_INSERT.format(side=side), _records(folder))
                self._database.execute("COMMIT")

    def counts(self) -> dict[str, int]:
        """Rows added, removed, changed, and unchanged with other token counts."""
        [[old]], [[new]] = (self._query(f"SELECT count(*) FROM {side}") for side in _SIDES)
        [(common, changed, recounted)] = self._query(
            "SELECT count(*), coalesce(sum(changed), 0), "
            "coalesce(sum(NOT changed AND recounted), 0) FROM (SELECT "
            "old.content != new.content OR old.part != new.part AS changed, "
            f"old.counts != new.counts AS recounted FROM {_BOTH})"
        )
        return {
            **{"old": old, "new": new, "added": new - common, "removed": old - common},
            **{"changed": changed, "recounted": recounted},
        }

    def changed_columns(self) -> dict[str, int]:
        """In how many rows each column changed, the most frequent first."""
        found: Counter[str] = Counter()
        with _room():
            for old, new in self._database.execute(
                f"SELECT old.content, new.content FROM {_BOTH} WHERE old.content != new.content"
            ):
                hashes = (struct.unpack(f"{len(_COMPARED)}q", side) for side in (old, new))
                pairs = zip(_COMPARED, *hashes, strict=True)
                found.update(name for name, before, after in pairs if before != after)
        return dict(found.most_common())

    def movements(self, column: str) -> list[dict[str, Any]]:
        """From what to what the `part` or the `answer` of a row went, and how often."""
        found = self._query(
            f"SELECT old.{column}, new.{column}, count(*) FROM {_BOTH} "
            f"WHERE old.{column} IS NOT new.{column} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
        )
        return [{"from": before, "to": after, "rows": rows} for before, after, rows in found]

    def lengths(self, column: str) -> dict[str, Any]:
        """A number's mean and percentiles over the kept rows of each side."""
        return {
            side: _summary(
                self._query(
                    f"SELECT {column}, count(*) FROM {side} WHERE part != '{REJECTED}' "
                    f"AND {column} IS NOT NULL GROUP BY 1 ORDER BY 1"
                )
            )
            for side in _SIDES
        }

    def _query(self, statement: str) -> list[Any]:
        with _room():
            return self._database.execute(statement).fetchall()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()


def _records(release: Path) -> Iterator[tuple[Any, ...]]:
    for part, rows in published_rows(release):
        if missing := {"id", "sample"} - set(rows.column_names):
            raise DatasetError(
                f"The rows of {str(release)!r} have no {sorted(missing)}: expected the columns "
                f"of a release, found {rows.column_names}. Compare two releases."
            )
        for row in rows.to_pylist():
            counts = [row.get(name) for name in _COUNTS]
            response = row.get("response")
            yield (
                row["id"],
                row["sample"],
                part,
                row.get("answer"),
                _hashes(_value(name, row.get(name)) for name in _COMPARED),
                _hashes(counts),
                counts[0],
                counts[2],
                None if response is None else len(response),
            )


def _value(column: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return failure_content(value) if column == "error" else value


def _hashes(values: Iterable[Any]) -> bytes:
    # Python's own hashes differ between processes, and these never leave this one.
    hashes = [hash(value) for value in values]
    return struct.pack(f"{len(hashes)}q", *hashes)


def short_hash(content: bytes) -> int:
    """A number of 64 bits that tells texts apart, the same in every process."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def json_line(values: list[Any]) -> bytes:
    """Values as one line that digests are made of."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(
            f"The rows can't be compared: {error}. They are matched in a temporary file: free "
            "some space, or set SQLITE_TMPDIR to a folder that has it."
        ) from error


def _find(given: Path | str, config: str | None) -> Pinned:
    release = find_release(given, ("data", REJECTED), config)
    if release is None:
        asked = f" of the configuration {config!r}" if config else ""
        raise DatasetError(
            f"{str(given)!r} is no release{asked}: expected a folder with manifest.json, a run's "
            "folder with release/, or a Hub dataset like 'org/name@v1.0.0'."
        )
    return release


def _facts(given: Path | str, found: Pinned) -> dict[str, Any]:
    manifest = read_manifest(found.path)
    return {
        "reference": str(given),
        "commit": found.commit,
        "identity": manifest.get("identity"),
        "version": manifest["version"],
        "content_digest": manifest["content_digest"],
        "splits": dict(manifest["splits"]),
        "rejected": rejected_rows(manifest),
    }


def _summary(distribution: Sequence[tuple[int, int]]) -> dict[str, float] | None:
    """Of a number's values, with how many rows have each: no percentile lies between two values."""
    import numpy as np

    if not distribution:
        return None
    values = np.repeat(*np.array(distribution).T)
    p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
    return {"mean": round(float(values.mean()), 2), "p50": p50, "p95": p95}


def _recipes(old: Recipe, new: Recipe) -> dict[str, Any]:
    prompts = old.prompt.splitlines(), new.prompt.splitlines()
    fields = [dict(flat(recipe.model_dump(mode="json"))) for recipe in (old, new)]
    files = [
        {
            (name, sha256((recipe.folder / name).read_bytes()).hexdigest())
            for name in recipe.attachments
        }
        for recipe in (old, new)
    ]
    return {
        "keys": {
            key: {side: values.get(key) for side, values in zip(_SIDES, fields, strict=True)}
            for key in changed_keys(fields[0], fields[1])
        },
        "files": sorted({name for name, _ in files[0] ^ files[1]}),
        "prompt": "\n".join(
            difflib.unified_diff(*prompts, fromfile="old", tofile="new", lineterm="")
        ),
    }


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    for side in _SIDES:
        facts = data[side]
        splits = ", ".join(f"{rows:,} {split}" for split, rows in facts["splits"].items())
        counts = f"{splits}, {facts['rejected']:,} rejected"
        yield f"{side}  {facts['reference']}: {facts['version']}, {counts}"
    rows, recipe = data["rows"], data["recipe"]
    yield ""
    yield "rows: " + ", ".join(f"{rows[what]:,} {what}" for what in ("added", "removed", "changed"))
    if rows["recounted"]:
        yield f"  {rows['recounted']:,} others differ in the teacher's token counts only"
    sections = {
        "columns": [f"{name} in {count:,}" for name, count in data["changed_columns"].items()],
        "moved": _movement_lines(data["moved"]),
        "labels": _movement_lines(data["labels"]),
        "lengths": _length_lines(data["lengths"]),
        "recipe": [
            *(f"{key}: {v['old']!r} -> {v['new']!r}" for key, v in recipe["keys"].items()),
            *(f"the file {name} changed" for name in recipe["files"]),
        ],
        "prompt": recipe["prompt"].splitlines(),
    }
    for title, lines in sections.items():
        if lines:
            yield f"{title}:"
            yield from (f"  {line}" for line in lines)


def _movement_lines(movements: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{moved['rows']:>8,}  {_label(moved['from'])} -> {_label(moved['to'])}"
        for moved in movements[:_MOST]
    ]
    if rest := movements[_MOST:]:
        rows = sum(moved["rows"] for moved in rest)
        lines.append(f"{rows:>8,}  in {len(rest):,} other ways")
    return lines


def _label(answer: str | None) -> str:
    if answer is None:
        return "(no answer)"
    return shortened(aligned([[answer]]), _WIDEST)


def _length_lines(lengths: Mapping[str, Any]) -> list[str]:
    rows = [["", "mean", "p50", "p95"]]
    for name, both in lengths.items():
        if all(both.values()):
            pairs = [f"{both['old'][what]:,} -> {both['new'][what]:,}" for what in both["old"]]
            rows.append([name.replace("_", " "), *pairs])
    return aligned(rows).splitlines()
