"""What a test split can decide is said before it is paid for, and no more of it is bought."""

from collections import Counter
from functools import partial

import pytest
from datasets import Dataset

from distill_datasets.errors import SettingsError
from distill_datasets.recipes.evidence import HeldOutRows, keep_for_evidence
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import least_margin, rows_needed
from tests.support.recipes import any_recipe

SPLIT = {"train": 0.5, "validation": 0.1, "test": 0.4}
recipe = partial(any_recipe, split=SPLIT)


def queries(size: int = 1, **splits: int) -> Dataset:
    """So many groups in each split, of so many rows; the splits take turns."""
    rows = [
        {"query": f"{split} {group} {row}", "group": f"{split} {group}", "split": split}
        for split, groups in splits.items()
        for group in range(groups)
        for row in range(size)
    ]
    return Dataset.from_list(rows[::2] + rows[1::2])


def test_a_split_says_what_it_can_decide() -> None:
    first, head, *rows, lack = HeldOutRows.of(recipe(), queries(train=90, test=300)).lines()
    assert first.startswith("300 test rows; where teacher and student are equally good")
    assert head.split("  ")[-1].strip() == "least margin of 300 rows"
    for row, share in zip(rows, (0.02, 0.05, 0.1), strict=True):
        needed = rows_needed(0.02, share)
        assert row.split()[:1] == [f"{share:.0%}"] and f" {needed:,} rows " in row
        assert row.endswith(f"{least_margin(300, share):.3f}")
    assert lack.startswith("Too few for a margin of 0.02: 300 rows of about 850. `distill-datasets")
    assert "of which 40% are test rows: about 1,375 more" in lack


def test_rows_of_groups_are_counted_by_the_group() -> None:
    found = HeldOutRows.of(recipe(), queries(size=15, train=3, test=21)).lines()
    assert found[0].startswith("315 test rows in 21 groups, counted as if alike within")
    assert "21 groups of about 850" in found[-1]


def test_enough_rows_lack_nothing() -> None:
    wide = recipe(margin=0.1)
    held = HeldOutRows.of(wide, queries(test=100))
    assert held.lack is None and len(held.lines()) == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (recipe(split={"same_rows": True}), "(same_rows): they decide nothing"),
        (recipe(), "no row is in the test split"),
    ],
)
def test_a_split_that_decides_nothing_says_so(asked: Recipe, said: str) -> None:
    (line,) = HeldOutRows.of(asked, queries(train=9)).lines()
    assert said in line


def test_a_margin_that_no_split_decides_is_to_be_raised() -> None:
    held = HeldOutRows.of(recipe(margin=0.0001), queries(test=9))
    assert held.lack == "No test split decides a margin of 0.0001: raise it."
    assert "over a million" in held.lines()[2]


def test_only_as_many_test_rows_are_kept_as_the_margin_needs() -> None:
    given = queries(size=2, train=70, validation=20, test=400)
    wide = recipe(margin=0.05)
    kept = keep_for_evidence(wide, given)
    needed = rows_needed(0.05, 0.05)
    assert needed is not None and needed < 400
    assert Counter(kept["split"]) == {"train": 140, "validation": 40, "test": 2 * needed}
    # In their order, whole groups, and the same ones whatever else is there.
    places = {query: place for place, query in enumerate(given["query"])}
    assert [places[query] for query in kept["query"]] == sorted(map(places.get, kept["query"]))
    assert set(Counter(kept["group"]).values()) == {2}
    again = keep_for_evidence(wide, queries(size=2, test=400))
    assert set(again["query"]) == {query for query in kept["query"] if query.startswith("test")}


def test_where_there_are_too_few_all_are_asked_and_it_is_said() -> None:
    given = queries(train=5, test=30)
    with pytest.warns(UserWarning, match="Too few for a margin of 0.02: 30 rows of about 850"):
        assert len(keep_for_evidence(recipe(), given)) == 35


def test_without_a_share_of_test_that_is_what_to_give() -> None:
    none = recipe(split={"train": 0.9, "validation": 0.1, "test": 0.0})
    lack = HeldOutRows.of(none, queries(train=5, test=3)).lack
    assert lack is not None and "Give test a share in `split:`; or widen" in lack


def test_no_row_is_evidence_where_all_are_trained_on() -> None:
    with pytest.raises(SettingsError, match="no row is held out to be evidence"):
        keep_for_evidence(recipe(split={"same_rows": True}), queries(train=5))
