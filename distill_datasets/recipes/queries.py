"""Reads a recipe's queries, wherever they are, into one table of text."""

import importlib.resources
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import RecipeError
from distill_datasets.hub.references import fetch_dataset
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SplitShares
from distill_datasets.schema import whole_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Columns = Mapping[str, list[str | None]]
_NAMES = ("id", "query", "group", "reference", "split")
_IN_MEMORY = 64 << 20  # bytes; tables that are larger are on disk, and mapped
_ROWS = 1_000  # that are read at a time
_READERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def load_queries(recipe: Recipe) -> "Dataset":
    """The recipe's rows in their order: `id`, `query`, `group`, `reference`, `split`.

    `id` is the digest of the query; a repeated query gets a numbered one, so that every row is
    kept. `group` is the query's own id where the recipe names no group column. Many rows are on
    disk, and mapped. Raises `RecipeError` that lists the columns found when one is missing, and
    for a source that is absent, empty or not the pinned content.
    """
    return _tabulate(_read(recipe), recipe.split)


def require_splits(recipe: Recipe, queries: "Dataset", needed: Sequence[str]) -> None:
    """Raise `RecipeError` where one of the splits that are needed has no query."""
    import pyarrow.compute as pc

    counted = pc.value_counts(queries.with_format("arrow")[:]["split"]).to_pylist()
    found = {one["values"]: one["counts"] for one in counted}
    if recipe.split.same_rows:
        found["test"] = found.get("train", 0) + found.get("test", 0)
    if missing := [split for split in needed if not found.get(split)]:
        groups = len(set(queries["group"]))
        raise RecipeError(
            f"The split {missing[0]!r} has no row: the {len(queries)} queries are of {groups} "
            f"groups, each in one split, and give {found}. Add queries of other groups, change "
            "the shares in `split:`, or say `split: {same_rows: true}` for a first try."
        )


def read_columns(recipe: Recipe) -> dict[str, list[str | None]]:
    """What the source says: `query`, `group`, `reference`, `split`; None where it says nothing."""
    found: dict[str, list[str | None]] = {}
    for columns in _read(recipe):
        for name, values in columns.items():
            found.setdefault(name, []).extend(values)
    return found


def unused_columns(recipe: Recipe) -> list[str]:
    """The columns of the queries' files in the recipe's folder that the recipe doesn't name."""
    spec = recipe.queries
    if not spec.file:
        return []
    lines = _lines(recipe)
    columns = _line_columns(lines) if lines else _selected(recipe).column_names
    used = {spec.group, spec.reference, spec.forced_split}
    used |= {spec.query} if spec.query else {"text" if {*columns} == {"text"} else "query"}
    return [name for name in columns if name not in used]


def write_used_columns(recipe: Recipe, path: Path) -> dict[str, str]:
    """Write the queries as lines of JSON that have the columns which the recipe uses.

    Returns what the section `queries` says of such a file, but for its name.
    """
    spec = recipe.queries
    names = {"group": spec.group, "reference": spec.reference, "split": spec.forced_split}
    named = {role: name for role, name in names.items() if name is not None}
    named["query"] = spec.query or "query"
    with path.open("w", encoding="utf-8") as file:
        for columns in _read(recipe):
            for row in zip(*(columns[role] for role in named), strict=True):
                cells = dict(zip(named.values(), row, strict=True))
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")
    return {("forced_split" if role == "split" else role): name for role, name in named.items()}


def _read(recipe: Recipe) -> Iterator[Columns]:
    """The columns of the source, a few rows at a time."""
    spec = recipe.queries
    names = {"query": spec.query, "group": spec.group, "reference": spec.reference}
    names["split"] = spec.forced_split
    first = True
    for rows in _pieces(recipe):
        if first:
            names["query"] = spec.query or ("text" if rows[0].keys() == {"text"} else "query")
            _check_columns(recipe, names, rows[0])
        first = False
        yield {role: _values(rows, name) for role, name in names.items()}
    if first:
        raise RecipeError(f"The queries of recipe {recipe.name!r} are empty: nothing to ask.")


def _pieces(recipe: Recipe) -> Iterator[Sequence[Mapping[str, Any]]]:
    """The source's rows, a few at a time."""
    if path := _lines(recipe):
        _check_file(path, recipe.queries.sha256)
        yield from read_lines(path)
        return
    for piece in _selected(recipe).iter(batch_size=_ROWS):
        yield [dict(zip(piece, row, strict=True)) for row in zip(*piece.values(), strict=True)]


def _lines(recipe: Recipe) -> Path | None:
    """The file, where it is one of JSON lines that is read as it is."""
    path, spec = _file(recipe), recipe.queries
    plain = path is not None and path.suffix == ".jsonl" and not spec.sidecar and spec.rows is None
    return path if plain else None


def _selected(recipe: Recipe) -> "Dataset":
    """The source with its sidecar, and only the rows that the recipe names."""
    from datasets import concatenate_datasets

    source = _source(recipe)
    spec = recipe.queries
    if spec.sidecar:
        sidecar = _read_file(recipe.folder / spec.sidecar)
        if len(sidecar) != len(source):
            raise RecipeError(
                f"The sidecar {spec.sidecar!r} has {len(sidecar)} rows and the queries "
                f"{len(source)}; they are joined by position and must match."
            )
        source = concatenate_datasets([source, sidecar], axis=1)
    return source if spec.rows is None else source.select([row - 1 for row in spec.rows])


def _file(recipe: Recipe) -> Path | None:
    spec = recipe.queries
    if spec.file:
        return recipe.folder / spec.file
    if spec.package and spec.member:
        return _in_package(spec.package, spec.member)
    return None


def _source(recipe: Recipe) -> "Dataset":
    spec = recipe.queries
    if path := _file(recipe):
        return _read_file(path, spec.sha256)
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    folder = _hub_folder(recipe) if spec.hub else _local_folder(spec.path or "")
    try:
        rows = load_dataset(str(folder), spec.config, split=spec.split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        name = spec.hub or spec.path
        raise RecipeError(f"The queries {name!r} can't be read: {error}") from error
    assert isinstance(rows, Dataset)
    return rows


def _hub_folder(recipe: Recipe) -> Path:
    spec = recipe.queries
    return fetch_dataset(f"{spec.hub}@{spec.revision}", spec.config).path


def _local_folder(path: str) -> Path:
    """By name `datasets` would take whatever version of a Hub dataset it finds."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise RecipeError(
            f"There is no folder {path!r}, which the recipe names as `queries.path`. A dataset on "
            "the Hub is named by `queries.hub` and pinned by `queries.revision`."
        )
    return folder


def _in_package(package: str, member: str) -> Path:
    try:
        return Path(str(importlib.resources.files(package) / member))
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"The queries are in the package {package!r}, which isn't installed: "
            f"`pip install {package.replace('_', '-')}`."
        ) from error


def _read_file(path: Path, pinned: str | None = None) -> "Dataset":
    from datasets import Dataset, load_dataset

    reader = _check_file(path, pinned)
    rows = load_dataset(reader, data_files=str(path), split="train")
    assert isinstance(rows, Dataset)
    return rows


def _check_file(path: Path, pinned: str | None) -> str:
    """The name of the reader for a file that is there, not empty, and what was pinned."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise RecipeError(f"{path.name!r}: expected one of {sorted(_READERS)}, by its ending.")
    if not path.is_file():
        raise RecipeError(f"There is no file {str(path)!r}; check the recipe's queries.")
    with path.open("rb") as file:
        if pinned and (found := file_digest(file, "sha256").hexdigest()) != pinned:
            raise RecipeError(
                f"{path} is not the content that the recipe pins: expected SHA-256 {pinned}, found "
                f"{found}. Install the version that the recipe was written for, or change `sha256`."
            )
        file.seek(0)
        if not any(block.strip() for block in iter(lambda: file.read(1 << 20), b"")):
            raise RecipeError(f"The queries file {str(path)!r} is empty: nothing to ask.")
    return reader


def _check_columns(recipe: Recipe, names: Mapping[str, str | None], row: Mapping[str, Any]) -> None:
    """Lines of JSON may have more columns than their first."""
    if {*names.values()} - {*row, None}:
        lines = _lines(recipe)
        columns = _line_columns(lines) if lines else list(row)
        for role, name in names.items():
            if name is not None and name not in columns:
                key = "forced_split" if role == "split" else role
                raise RecipeError(
                    f"The queries have no column {name!r} (the recipe's `queries.{key}`); found "
                    f"{columns}."
                )


def _values(rows: Sequence[Mapping[str, Any]], name: str | None) -> list[str | None]:
    if name is None:
        return [None] * len(rows)
    values = (row.get(name) for row in rows)
    return [None if value is None or value == "" else str(value) for value in values]


def read_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Some rows, again and again; a row may leave columns out.

    Raises `RecipeError` with the line that is no object.
    """
    objects = _objects(path)
    while rows := list(islice(objects, _ROWS)):
        yield rows


def _line_columns(path: Path) -> list[str]:
    """The columns of all rows; costs as much as reading them."""
    return list(dict.fromkeys(name for row in _objects(path) for name in row))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                if "\\ud" in line.lower():  # maybe half a surrogate pair
                    found = json.loads(whole_text(json.dumps(found, ensure_ascii=False)))
            except ValueError as error:
                raise _unreadable(path, number, str(error)) from error
            if not isinstance(found, dict):
                raise _unreadable(path, number, f"found {line.strip()[:80]!r}")
            yield found


def _unreadable(path: Path, number: int, found: str) -> RecipeError:
    return RecipeError(
        f"Line {number} of {str(path)!r} can't be read: expected a JSON object, {found}. Mend the "
        "line, or name a file of another kind."
    )


def _tabulate(some: Iterable[Columns], split: SplitShares) -> "Dataset":
    """All rows of `query`, `group`, `reference` and `split`, which come a few at a time.

    Raises `RecipeError` for an empty query.
    """
    from datasets import Dataset, Features, Value

    features = Features(dict.fromkeys(_NAMES, Value("string")))
    rows = _RowMaker(split, features.arrow_schema)
    table = _gather(map(rows.complete, some), features.arrow_schema)
    # `datasets` would hash the whole table for want of a name.
    return Dataset(table, fingerprint=rows.content.hexdigest()[:32])


class _RowMaker:
    """Gives rows their id, group and split; equal queries are told apart by a number."""

    def __init__(self, split: SplitShares, schema: "pa.Schema") -> None:
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
