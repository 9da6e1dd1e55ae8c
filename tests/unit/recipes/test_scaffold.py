"""Samples of new recipes are known again, and are nobody's queries."""

from pathlib import Path

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.files import TEMPLATES
from distill_datasets.recipes.loading import load_recipe, new_recipe, samples_among
from distill_datasets.recipes.queries import load_queries


@pytest.mark.parametrize("like", TEMPLATES)
def test_a_sample_has_all_splits_and_says_so_when_its_prompt_is_another(
    tmp_path: Path, like: str
) -> None:
    folder = new_recipe("mine", tmp_path / "mine", like=like)
    queries = load_queries(load_recipe(folder))
    assert {"train", "test"} <= {*queries["split"]}
    assert samples_among(queries["query"], load_recipe(folder).prompt) == []
    (folder / "prompt.md").write_text("Another prompt.")
    with pytest.warns(
        UserWarning, match=f"{len(queries)} of the {len(queries)} queries .* samples"
    ):
        load_queries(load_recipe(folder))


def test_queries_that_two_samples_share_belong_to_both(tmp_path: Path) -> None:
    labels = new_recipe("a", tmp_path / "a", like="labels")
    queries = load_queries(load_recipe(labels))["query"]
    assert samples_among(queries, (labels / "prompt.md").read_text().strip()) == []
    assert samples_among(["mine", queries[0]], "mine") == [queries[0]]


def test_an_unknown_kind_names_the_closest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tools'"):
        new_recipe("a", tmp_path / "a", like="tool")


@pytest.mark.parametrize("name", ["2024", "no", "1e3"])
def test_a_name_that_yaml_takes_for_something_else_is_kept(tmp_path: Path, name: str) -> None:
    assert load_recipe(new_recipe(name, tmp_path / "folder")).name == name


@pytest.mark.parametrize("name", ["größe", "a b", ".hidden", ""])
def test_nothing_is_written_for_a_name_that_no_recipe_may_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="can't name a recipe"):
        new_recipe(name, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
