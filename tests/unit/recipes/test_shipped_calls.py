"""The calls that shipped recipes expect are calls of their own tools."""

import json

import pytest

from distill_datasets.conversations import read_calls, write_calls
from distill_datasets.recipes.loading import shipped_recipes
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
