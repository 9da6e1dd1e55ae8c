"""Sentences with secrets, planted in a copy of a prompt."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.prompt import (
    OTHERS,
    canaries_of,
    fields_of,
    fill,
    is_jinja,
    plant,
    render,
)
from distill_datasets.recipes.recipe import Recipe
from tests.conftest import edit


@pytest.mark.parametrize(
    "text",
    [
        'Answer as {{"name": "Ann"}}, please',
        "v{{1,2}} and \\frac{a}{b}",
        "Keep {# this #} and {#1",
        "Write {% if urgent %}now{% endif %} in Liquid",
        "Dear {{first_name}}, {{#each items}}{{this}}{{/each}}",
        "{{{raw}}} {{ }} }} {{",
        "{{-  name -}}",
    ],
)
def test_braces_in_a_prompt_are_text(recipe_folder: Path, text: str) -> None:
    (recipe_folder / "prompt.md").write_text(text)
    messages = load_recipe(recipe_folder).messages("a rose")
    assert [message["content"] for message in messages] == [text, "a rose"]
    (recipe_folder / "prompt.md").write_text(text + " {{ query }}")
    (message,) = load_recipe(recipe_folder).messages("a {{ query }} rose")
    assert message["content"] == text + " a {{ query }} rose"


def test_the_variables_that_a_recipe_declares_are_replaced(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "variables: {shop: 'A {{ query }}'}\nlicense:")
    (recipe_folder / "prompt.md").write_text("For {{ shop }}, {{other}}: {{query}}")
    recipe = load_recipe(recipe_folder)
    assert recipe.messages("?")[0]["content"] == "For A {{ query }}, {{other}}: ?"
    recipe.dump(recipe_folder / "copy")
    assert load_recipe(recipe_folder / "copy").digest == recipe.digest


def test_variables_are_part_of_the_digest(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder)
    assert recipe.replace(variables={"a": "b"}).digest != recipe.digest
    assert recipe.replace(template="text").digest == recipe.digest


@pytest.mark.parametrize(
    "text", ["Say {{ query | upper }}", "{% if query %}x{% endif %}", "{{- query }}"]
)
def test_the_query_in_a_template_that_is_not_declared_is_an_error(
    recipe_folder: Path, text: str
) -> None:
    (recipe_folder / "prompt.md").write_text(text)
    with pytest.raises(RecipeError, match="write 'template: jinja' .* or 'template: text'"):
        load_recipe(recipe_folder)
    edit(recipe_folder, "recipe.yaml", "license:", "template: text\nlicense:")
    assert load_recipe(recipe_folder).messages("a")[0]["content"] == text


def test_a_template_that_is_sent_as_it_is_written_is_warned_of(recipe_folder: Path) -> None:
    (recipe_folder / "prompt.md").write_text("{% raw %}{{ x }}{% endraw %}")
    with pytest.warns(UserWarning, match="sent as it is written"):
        recipe = load_recipe(recipe_folder)
    assert recipe.messages("a")[0]["content"] == "{% raw %}{{ x }}{% endraw %}"


def test_a_release_of_version_0_1_is_filled_as_it_was(recipe_folder: Path, tmp_path: Path) -> None:
    (recipe_folder / "prompt.md").write_text("{# why #}Do {% if query %}{{ query }}{% endif %}!")
    old = recipe_folder.rename(tmp_path / "recipe")
    (tmp_path / "manifest.json").write_text("{}")
    recipe = load_recipe(old)
    assert recipe.messages("it") == [{"role": "user", "content": "Do it!"}]


def test_a_release_of_a_prompt_with_braces_is_the_same_text(
    recipe_folder: Path, tmp_path: Path
) -> None:
    (recipe_folder / "prompt.md").write_text("Keep {# this #}.")
    recipe = load_recipe(recipe_folder)
    recipe.dump(tmp_path / "recipe")
    (tmp_path / "manifest.json").write_text("{}")
    again = load_recipe(tmp_path / "recipe")
    assert again.messages("a") == recipe.messages("a")
    assert again.digest == recipe.digest


def test_filling_is_jinja_s_where_there_is_nothing_but_the_query() -> None:
    text = "A {b} of {{query}}, {{ query }}\nand {{  query  }}."
    assert not is_jinja(text)
    assert fill(text, {"query": "x {{ query }}"}) == render(text, query="x {{ query }}")


def test_a_prompt_that_grows_without_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match="comes to over"):
        fill("{{ query }}" * 1_000, {"query": "x" * 100_000})
    with pytest.raises(RecipeError, match="comes to over"):
        render("{{ query }}" * 1_000 + "!", query="x" * 100_000)


@pytest.mark.parametrize("template", ["{{ 'x' * 50000000 }}", "{{ query }}{{ 'ab' * 25000000 }}"])
def test_the_fields_of_a_template_are_found_without_computing_its_constants(template: str) -> None:
    tracemalloc.start()
    fields = fields_of(template)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert fields == ({"query"} if "query" in template else set())
    assert most < 10_000_000


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
