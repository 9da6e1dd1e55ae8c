"""The answers of a run, in one piece or in parts, as one release is written from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError
from distill_datasets.generation.ledger import JournaledRows
from distill_datasets.generation.shards import Joined, find_parts, join_parts, join_summaries
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.contents import Survey, answered_contents, survey
from distill_datasets.schema import answer_features

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RunAnswers:
    """Rows, how they were made, the recipe, and one look at it all; `sources` go into a ledger."""

    rows: "Dataset | Joined"
    generation: Mapping[str, Any]
    recipe: Recipe
    survey: Survey
    sources: Sequence[JournaledRows]

    @property
    def digest(self) -> str:
        """Names the rows and the recipe, not their files."""
        return self.survey.digest(self.recipe.digest)


def load_answers(runs: Sequence[Path], *, ledger: bool) -> RunAnswers:
    """What the folders of a run, or of its parts, hold; without a `ledger` no sources.

    Raises `DatasetError` for parts or answers that are missing, and where no row can be used.
    """
    from datasets import load_from_disk

    parts = find_parts(runs)
    folder = parts[0] / "answers"
    recipe = load_recipe(folder)
    each = [load_from_disk(str(part / "answers")) for part in parts]
    summaries = [_summary(part / "answers") for part in parts]
    generation = summaries[0] if len(parts) == 1 else join_summaries(parts, summaries)
    for part, some, summary in zip(parts, each, summaries, strict=True):
        _check(some, summary, recipe, part / "answers")
    rows = each[0] if len(parts) == 1 else join_parts(parts, each)
    found = survey(answered_contents(rows, recipe))
    if not found.splits:
        reasons = dict(found.rejected) | ({"failed": found.errors} if found.errors else {})
        raise DatasetError(
            f"{str(folder)!r} has nothing to publish: none of its {len(rows)} rows can be used "
            f"({reasons}). Look at its `raw` and `error` columns, then mend the recipe."
        )
    journals = [(rows, part / "journal.sqlite") for rows, part in zip(each, parts, strict=True)]
    kept = [JournaledRows(*source) for source in journals if ledger and source[1].is_file()]
    return RunAnswers(rows, generation, recipe, found, kept)


def _summary(answers: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((answers / "generation.json").read_text(encoding="utf-8"))
    return summary


def _check(rows: "Dataset", generation: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    if missing := answer_features().keys() - rows.features.keys():
        raise DatasetError(
            f"{str(folder)!r} lacks the columns {sorted(missing)}; found {rows.column_names}. "
            "Run `generate` again."
        )
    if generation["recipe_digest"] != recipe.digest:
        raise DatasetError(
            f"{folder / 'recipe'} is not the recipe of these answers: expected the digest "
            f"{generation['recipe_digest']}, found {recipe.digest}. Run `generate` again."
        )
