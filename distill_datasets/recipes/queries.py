"""Reads a recipe's queries, wherever they are, into one table."""

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import RecipeError
from distill_datasets.hub.references import fetch_dataset
from distill_datasets.recipes.json_lines import ROWS, read_lines, read_names
from distill_datasets.recipes.query_table import Columns, tabulate
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

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
    return tabulate(_read(recipe), recipe.split)


def read_columns(recipe: Recipe) -> dict[str, list[str | None]]:
    """What the source says: `query`, `group`, `reference`, `split`; None where it says nothing."""
    found: dict[str, list[str | None]] = {}
    for columns in _read(recipe):
        for name, values in columns.items():
            found.setdefault(name, []).extend(values)
    return found


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
    for piece in _selected(recipe).iter(batch_size=ROWS):
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
        columns = read_names(lines) if lines else list(row)
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
