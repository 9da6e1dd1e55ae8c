"""The rows to measure on: all queries of a release's split, answered usefully or not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError
from distill_datasets.hub.references import Pinned, find_release
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("id", "query", "group", "reference")


@dataclass(frozen=True)
class HeldOut:
    """One split of a release, a row a query, with what `ask` needs.

    `reference` is what was asked for; `commit` is that of a Hub dataset.
    """

    reference: str
    commit: str | None
    path: Path
    manifest: Mapping[str, Any]
    recipe: Recipe
    split: str
    rows: "Dataset"


def read_held_out(dataset: str | Path, *, split: str, limit: int | None = None) -> HeldOut:
    """The queries of a split of a release: a folder, a run's folder, or a Hub dataset.

    A release's splits hold what the teacher answered usefully; measuring only there would flatter
    the teacher, so the rejected queries of the split come after them. `limit` takes the first.
    Raises `DatasetError` for a folder that is no release, and for an unknown or empty split.
    """
    found = _find(dataset)
    folder = found.path
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if not (folder / "recipe" / "recipe.yaml").is_file():
        raise DatasetError(
            f"The release {str(folder)!r} has no recipe: expected recipe/recipe.yaml and "
            "recipe/prompt.md, which say how the teacher is asked. Publish it again."
        )
    recipe = load_recipe(folder / "recipe")
    queries = _queries(folder, split, recipe)
    if not queries:
        raise DatasetError(
            f"{str(folder)!r} has no rows in a split {split!r}; found {_splits(folder, manifest)}."
            + (" Raise the recipe's share of it, or add queries." if split == "test" else "")
        )
    rows = _dataset(queries[:limit], split)
    return HeldOut(str(dataset), found.commit, folder, manifest, recipe, split, rows)


def splits_of(dataset: str | Path) -> list[str]:
    """The splits of a release, wherever it is; raises `DatasetError` where there is none."""
    manifest = json.loads((_find(dataset).path / "manifest.json").read_text(encoding="utf-8"))
    return list(manifest["splits"])


def _find(dataset: str | Path) -> Pinned:
    found = find_release(dataset, ("data", "rejected"))
    if found is None:
        raise DatasetError(
            f"{str(dataset)!r} is no release: expected a folder with manifest.json (or a run's "
            "folder with release/), which `publish` writes, or a Hub dataset like "
            "'org/name@v1.0.0'."
        )
    return found


def _queries(folder: Path, split: str, recipe: Recipe) -> list[dict[str, Any]]:
    """One row a query, in the release's order; of several samples the first stands for it."""
    # With `same_rows` every row is in train and test, and a rejected row only says train.
    splits = {split, "train"} if recipe.split.same_rows and split == "test" else {split}
    rejected = [row for row in _rejected(folder) if row["split"] in splits]
    found: dict[str, dict[str, Any]] = {}
    for row in [*_read(folder / "data", split, _COLUMNS), *rejected]:
        found.setdefault(row["id"], row)
    return list(found.values())


def _rejected(folder: Path) -> list[dict[str, Any]]:
    return _read(folder / "rejected", "rejected", (*_COLUMNS, "split"))


def _read(folder: Path, name: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table

    paths = sorted(folder.glob(f"{name}-*.parquet"))
    return [row for path in paths for row in read_table(path, columns=list(columns)).to_pylist()]


def _splits(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    return sorted({*manifest["splits"], *(row["split"] for row in _rejected(folder))})


def _dataset(queries: list[dict[str, Any]], split: str) -> "Dataset":
    from datasets import Dataset, Features, Value

    columns = {name: [row[name] for row in queries] for name in _COLUMNS}
    columns["group"] = [row["group"] or row["id"] for row in queries]
    features = Features(dict.fromkeys((*_COLUMNS, "split"), Value("string")))
    return Dataset.from_dict({**columns, "split": [split] * len(queries)}, features=features)
