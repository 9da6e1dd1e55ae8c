"""What shipped recipes hold: calls of their own tools, and nothing held out where it is shown."""

import json
from collections import defaultdict

import pytest

from distill_datasets.conversations import read_calls, write_calls
from distill_datasets.recipes.loading import load_recipe, shipped_recipes
from distill_datasets.recipes.queries import read_columns
from distill_datasets.recipes.recipe import Recipe

WITH_TOOLS = [recipe for recipe in shipped_recipes() if recipe.tools]


@pytest.mark.parametrize("recipe", WITH_TOOLS, ids=lambda recipe: recipe.name)
def test_every_expected_call_fits_the_catalogue(recipe: Recipe) -> None:
    reader = recipe.teacher_reader
    for reference in filter(None, read_columns(recipe)["reference"]):
        if calls := read_calls(reference):
            assert reader.read(write_calls("", calls), "stop").answer == reference


@pytest.mark.parametrize("recipe", WITH_TOOLS, ids=lambda recipe: recipe.name)
def test_every_tool_is_expected_by_several_queries(recipe: Recipe) -> None:
    expected = [
        call.name
        for reference in filter(None, read_columns(recipe)["reference"])
        for call in read_calls(reference)
    ]
    names = [tool["function"]["name"] for tool in json.loads(recipe.tools_text or "[]")]

    assert {name for name in names if expected.count(name) < 3} == set()


RECIPE = load_recipe("order")
SHOWN = "examples"


def orders() -> dict[str, list[tuple[str, str]]]:
    """The messages of each split with what they order, and those that stand in the prompt."""
    columns = read_columns(RECIPE)
    found = defaultdict(list)
    rows = zip(columns["split"], columns["query"], columns["reference"], strict=True)
    for split, query, reference in rows:
        assert split and reference
        found[split].append((query, reference))
    found[SHOWN] = [(one["content"], two["content"]) for one, two in RECIPE.all_examples]
    return found


def fields(reference: str) -> dict[str, str]:
    return dict(part.split(": ") for part in reference.split("; "))


def wording(query: str, reference: str) -> str:
    """The message with the name of a field where its value stands."""
    for key, value in fields(reference).items():
        query = query.replace(value, f"<{key}>")
    return query


def test_each_split_has_names_cities_and_items_of_its_own() -> None:
    seen = {
        split: {value for _, said in rows for key, value in fields(said).items() if key[0] != "q"}
        for split, rows in orders().items()
    }
    for split in ("test", "wordings", "validation"):
        others = set[str]().union(*(found for name, found in seen.items() if name != split))
        assert not seen[split] & others
    assert not seen["train"] & seen[SHOWN]


def test_one_split_is_worded_as_no_other_is() -> None:
    said = {split: {wording(*row) for row in rows} for split, rows in orders().items()}
    new = said.pop("wordings")
    assert len(new) >= 4
    assert not new & set[str]().union(*said.values())
    assert said["test"] <= said["train"]


def test_every_order_and_example_is_in_the_form_that_is_read() -> None:
    for rows in orders().values():
        for query, reference in rows:
            assert RECIPE.teacher_reader.read(reference, "stop").answer == reference
            assert all(value in query for value in fields(reference).values())
