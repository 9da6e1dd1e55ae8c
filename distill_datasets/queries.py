"""Reads a recipe's queries, wherever they are, into one table."""

import importlib.resources
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import RecipeError
from distill_datasets.pinned import fetch_dataset
from distill_datasets.recipe import Recipe
from distill_datasets.recipe_sections import Split

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
    kept. `group` is the query's own id where the recipe names no group column. Raises
    `RecipeError` that lists the columns found when one is missing, and for a source that is
    absent, empty or not the pinned content.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets

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
    if spec.rows is not None:
        source = source.select([row - 1 for row in spec.rows])
    if len(source) == 0:
        raise RecipeError(f"The queries of recipe {recipe.name!r} are empty: nothing to ask.")
    columns = {
        "query": _column(source, spec.query or _default_column(source), "query"),
        "group": _column(source, spec.group, "group"),
        "reference": _column(source, spec.reference, "reference"),
        "split": _column(source, spec.forced_split, "forced_split"),
    }
    queries = [_checked(text, row) for row, text in enumerate(columns["query"], 1)]
    ids = _ids(queries)
    groups = [group or own for group, own in zip(columns["group"], _own(queries), strict=True)]
    splits = [
        forced or _split(recipe.split, group)
        for forced, group in zip(columns["split"], groups, strict=True)
    ]
    text = Value("string")
    return Dataset.from_dict(
        {
            "id": ids,
            "query": queries,
            "group": groups,
            "reference": columns["reference"],
            "split": splits,
        },
        features=Features(dict.fromkeys(("id", "query", "group", "reference", "split"), text)),
    )


def _split(split: Split, group: str) -> str:
    return "train" if split.same_rows else split.of(group)


def _source(recipe: Recipe) -> "Dataset":
    spec = recipe.queries
    if spec.file:
        return _read_file(recipe.folder / spec.file, spec.sha256)
    if spec.package and spec.member:
        return _read_file(_in_package(spec.package, spec.member), spec.sha256)
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

    reader = _READERS.get(path.suffix)
    if reader is None:
        raise RecipeError(f"{path.name!r}: expected one of {sorted(_READERS)}, by its ending.")
    if not path.is_file():
        raise RecipeError(f"There is no file {str(path)!r}; check the recipe's queries.")
    content = path.read_bytes()
    found = sha256(content).hexdigest()
    if pinned and found != pinned:
        raise RecipeError(
            f"{path} is not the content that the recipe pins: expected SHA-256 {pinned}, found "
            f"{found}. Install the version that the recipe was written for, or change `sha256`."
        )
    if not content.strip():
        raise RecipeError(f"The queries file {str(path)!r} is empty: nothing to ask.")
    rows = load_dataset(reader, data_files=str(path), split="train")
    assert isinstance(rows, Dataset)
    return rows


def _default_column(rows: "Dataset") -> str:
    return "text" if rows.column_names == ["text"] else "query"


def _column(rows: "Dataset", name: str | None, role: str) -> list[str | None]:
    if name is None:
        return [None] * len(rows)
    if name not in rows.column_names:
        raise RecipeError(
            f"The queries have no column {name!r} (the recipe's `queries.{role}`); found "
            f"{rows.column_names}."
        )
    values = rows[name][:]
    return [None if value is None or value == "" else str(value) for value in values]


def _checked(text: str | None, row: int) -> str:
    if text is None or not text.strip():
        raise RecipeError(f"Query {row} is empty: remove the row or fill it.")
    return text


def _own(queries: list[str]) -> list[str]:
    return [sha256(query.encode()).hexdigest()[:16] for query in queries]


def _ids(queries: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    ids = []
    for own in _own(queries):
        seen[own] += 1
        ids.append(own if seen[own] == 1 else f"{own}-{seen[own]}")
    return ids
