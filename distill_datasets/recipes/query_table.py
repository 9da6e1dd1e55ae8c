"""Queries as one table of `id`, `query`, `group`, `reference` and `split`, however many."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.sections import Split

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Columns = Mapping[str, list[str | None]]
_NAMES = ("id", "query", "group", "reference", "split")
_IN_MEMORY = 64 << 20  # bytes; tables that are larger are on disk, and mapped


def tabulate(some: Iterable[Columns], split: Split) -> "Dataset":
    """All rows of `query`, `group`, `reference` and `split`, which come a few at a time.

    Raises `RecipeError` for an empty query.
    """
    from datasets import Dataset, Features, Value

    features = Features(dict.fromkeys(_NAMES, Value("string")))
    rows = _Rows(split, features.arrow_schema)
    table = _gather(map(rows.complete, some), features.arrow_schema)
    # `datasets` would hash the whole table for want of a name.
    return Dataset(table, fingerprint=rows.content.hexdigest()[:32])


class _Rows:
    """Gives rows their id, group and split; equal queries are told apart by a number."""

    def __init__(self, split: Split, schema: "pa.Schema") -> None:
        self.split, self.schema = split, schema
        self.content = sha256()
        self._count = 0
        self._seen: set[int] = set()
        self._again: Counter[int] = Counter()

    def complete(self, columns: Columns) -> "pa.RecordBatch":
        """The rows that follow those so far."""
        import pyarrow as pa

        queries = [self._checked(text) for text in columns["query"]]
        own = [sha256(query.encode()).hexdigest()[:16] for query in queries]
        groups = [group or name for group, name in zip(columns["group"], own, strict=True)]
        splits = [
            forced or self._split(group)
            for forced, group in zip(columns["split"], groups, strict=True)
        ]
        ids = [self._id(name) for name in own]
        found = [ids, queries, groups, columns["reference"], splits]
        for row in zip(ids, groups, columns["reference"], splits, strict=True):
            self.content.update(repr(row).encode())
        return pa.RecordBatch.from_arrays(
            [pa.array(column, pa.string()) for column in found], schema=self.schema
        )

    def _checked(self, text: str | None) -> str:
        self._count += 1
        if text is None or not text.strip():
            raise RecipeError(f"Query {self._count} is empty: remove the row or fill it.")
        return text

    def _split(self, group: str) -> str:
        return "train" if self.split.same_rows else self.split.of(group)

    def _id(self, name: str) -> str:
        number = int(name, 16)  # a third of the text's memory
        if number not in self._seen:
            self._seen.add(number)
            return name
        self._again[number] += 1
        return f"{name}-{self._again[number] + 1}"


def _gather(batches: Iterator["pa.RecordBatch"], schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    held, size = [], 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size > _IN_MEMORY:
            return _mapped(held, batches, schema)
    return pa.Table.from_batches(held, schema)


def _mapped(
    held: list["pa.RecordBatch"], others: Iterator["pa.RecordBatch"], schema: "pa.Schema"
) -> "pa.Table":
    """A table over a file that nobody else finds, and that goes when the table does."""
    import pyarrow as pa

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "queries.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while held:
                writer.write_batch(held.pop(0))
            for batch in others:
                writer.write_batch(batch)
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
