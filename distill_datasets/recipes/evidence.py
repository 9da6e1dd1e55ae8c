"""What a test split can decide about a student, and how many of its rows that takes."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import ceil
from typing import TYPE_CHECKING
from warnings import warn

from distill_datasets.errors import SettingsError
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import least_margin, rows_needed
from distill_datasets.tables import aligned

if TYPE_CHECKING:
    from datasets import Dataset

GUESSES = (0.02, 0.05, 0.1)  # shares of the rows where only one of teacher and student is right
PLANNED = 0.05  # the one of them that rows are bought for


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of a recipe's test split, as far as they are asked, and the `groups` they are of.

    Rows of a group may be all alike, so that the groups are what counts.
    """

    recipe: Recipe
    rows: int
    groups: int

    @classmethod
    def of(cls, recipe: Recipe, queries: "Dataset") -> "HeldOutRows":
        """That of the queries that `load_queries` gives."""
        groups = _test_groups(queries)
        return cls(recipe, len(groups), len(set(groups)))

    @cached_property
    def needed(self) -> int | None:
        """How many rows the recipe's margin needs, in groups of their own; None for a million."""
        return rows_needed(self.recipe.margin, PLANNED)

    def lines(self) -> list[str]:
        """What it can decide, for people, before anything is paid."""
        if self.recipe.split.same_rows:
            return ["the test rows are those of training (same_rows): they decide nothing"]
        if not self.groups:
            return ["no row is in the test split: nothing will be decided"]
        unit, related = "rows", ""
        if self.groups < self.rows:
            unit, related = "groups", f" in {self.groups:,} groups, counted as if alike within"
        margin = self.recipe.margin
        cells = [["differ on", f"needed for {margin:g}", f"least margin of {self.groups:,} {unit}"]]
        for share in GUESSES:
            needed = rows_needed(margin, share)
            cells.append(
                [
                    f"{share:.0%} of rows",
                    "over a million" if needed is None else f"{needed:,} {unit}",
                    f"{least_margin(self.groups, share):.3f}",
                ]
            )
        return [
            f"{self.rows:,} test rows{related}; where teacher and student are equally good, and",
            *aligned(cells).splitlines(),
            *([self.lack] if self.lack else []),
        ]

    @property
    def lack(self) -> str | None:
        """What to do where there are too few."""
        if self.needed is None:
            return f"No test split decides a margin of {self.recipe.margin:g}: raise it."
        if self.groups >= self.needed:
            return None
        unit = "groups" if self.groups < self.rows else "rows"
        lacking = self.needed - self.groups
        share = self.recipe.split.test
        how = (
            f"`distill-datasets synthesize` writes queries, of which {share:.0%} are test rows: "
            f"about {ceil(lacking / share):,} more"
            if share
            else "Give test a share in `split:`"
        )
        return (
            f"Too few for a margin of {self.recipe.margin:g}: {self.groups:,} {unit} of about "
            f"{self.needed:,}. {how}; or widen `margin`."
        )


def keep_for_evidence(recipe: Recipe, queries: "Dataset") -> "Dataset":
    """The queries without those of the test split that its margin doesn't need.

    Which are kept goes by the hash of their groups, so that more queries change few of them.
    Warns where there are too few; raises `SettingsError` where nothing is held out.
    """
    if recipe.split.same_rows:
        raise SettingsError(
            "With `split: {same_rows: true}` no row is held out to be evidence: remove that, or "
            "--for-evidence."
        )
    split = HeldOutRows.of(recipe, queries)
    if split.lack:
        warn(split.lack, stacklevel=2)
    if split.needed is None or split.groups <= split.needed:
        return queries
    order = sorted(set(_test_groups(queries)), key=lambda group: sha256(group.encode()).digest())
    kept = set(order[: split.needed])
    rows = zip(queries["split"], queries["group"], strict=True)
    return queries.select(
        [place for place, (name, group) in enumerate(rows) if name != "test" or group in kept]
    )


def _test_groups(queries: "Dataset") -> list[str]:
    rows = zip(queries["split"], queries["group"], strict=True)
    return [group for split, group in rows if split == "test"]
