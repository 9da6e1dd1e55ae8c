"""A recipe for tests that ask nobody."""

from typing import Any

from distill_datasets.recipes.recipe import Recipe


def any_recipe(**keys: Any) -> Recipe:
    """The least that a recipe says, and these keys."""
    fields = {
        "name": "colours",
        "description": "x",
        "teacher": "openai:x",
        "queries": {"hub": "me/colours", "revision": "v1"},
        "prompt": "Name the colour.",
    }
    return Recipe(**{**fields, **keys})
