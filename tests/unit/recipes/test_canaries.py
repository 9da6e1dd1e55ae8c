"""Sentences with secrets, planted in a copy of a prompt."""

from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.prompt import OTHERS, canaries_of, plant
from distill_datasets.recipes.recipe import Recipe


def recipe(**keys: Any) -> Recipe:
    fields = {"name": "r", "description": "d", "teacher": "pocket", "prompt": "One.\n\nTwo."}
    return Recipe(**{**fields, "queries": {"hub": "a/b", "revision": "c" * 40}, **keys})


def test_planted_sentences_are_in_the_copy_alone_and_their_secrets_differ() -> None:
    canaries = canaries_of("r", 2)
    copy = plant("One.\n\nTwo.", canaries)
    assert all(copy.count(one.sentence) == 1 for one in canaries)
    assert copy.startswith("One.\n\n")
    assert all(len({one.secret, *one.others}) == 1 + OTHERS for one in canaries)
    assert plant(copy, canaries) == copy
    assert canaries_of("other", 1)[0].secret != canaries[0].secret


def test_a_recipe_that_names_canaries_has_them_in_its_prompt_and_another_digest() -> None:
    plain, planted = recipe(), recipe(canaries=2)
    assert planted.prompt == plant("One.\n\nTwo.", canaries_of("r", 2))
    assert plain.replace(canaries=2) == planted
    assert plain.prompt == recipe(canaries=0).prompt
    assert plain.digest == recipe(canaries=0).digest != planted.digest


def test_a_copy_that_was_written_down_is_read_back_as_it_was(tmp_path: Path) -> None:
    planted = recipe(canaries=3)
    planted.dump(tmp_path)
    assert "canaries: 3" in (tmp_path / "recipe.yaml").read_text()
    again = load_recipe(tmp_path)
    assert (again.prompt, again.digest) == (planted.prompt, planted.digest)


@pytest.mark.parametrize("count", ["3", 3.0, True])
def test_a_number_that_is_none_is_refused_and_plants_nothing(count: object) -> None:
    with pytest.raises(ValueError, match="canaries"):
        recipe(canaries=count)


def test_more_sentences_than_a_prompt_may_hold_are_refused(tmp_path: Path) -> None:
    planted = recipe()
    planted.dump(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text() + "canaries: 11\n")
    with pytest.raises(RecipeError, match="canaries"):
        load_recipe(tmp_path)
