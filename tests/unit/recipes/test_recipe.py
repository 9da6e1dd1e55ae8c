from pathlib import Path

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe, shipped_recipes
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SplitShares
from tests.conftest import edit


def test_every_shipped_recipe_loads() -> None:
    recipes = shipped_recipes()
    assert {"language_id", "json_extraction"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        assert recipe.name.removesuffix(f"-{recipe.variant}") == recipe.folder.name


def test_an_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'language_id'"):
        load_recipe("langauge_id")


def test_an_unknown_key_is_named_with_the_closest_valid_one(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "licence:")
    with pytest.raises(RecipeError, match="unknown key 'licence'. Did you mean 'license'"):
        load_recipe(recipe_folder)


def test_an_unknown_nested_key_is_named_with_its_section(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "choices:", "choises:")
    with pytest.raises(RecipeError, match=r"'answer\.choises'. Did you mean 'choices'"):
        load_recipe(recipe_folder)


def test_a_missing_key_is_named(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "description: Which colour is it?\n", "")
    with pytest.raises(RecipeError, match="'description' is missing"):
        load_recipe(recipe_folder)


def test_an_unknown_template_field_is_an_error_that_names_the_known_one(
    recipe_folder: Path,
) -> None:
    (recipe_folder / "prompt.md").write_text("Answer {{ qurey }}")
    with pytest.raises(RecipeError, match="unknown field 'qurey'. Did you mean 'query'"):
        load_recipe(recipe_folder)


def test_a_prompt_without_the_query_is_the_system_message(recipe_folder: Path) -> None:
    messages = load_recipe(recipe_folder).messages("a rose")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"] == "a rose"


def test_a_prompt_with_the_query_is_one_user_message(recipe_folder: Path) -> None:
    (recipe_folder / "prompt.md").write_text("Colour of {{ query }}?")
    messages = load_recipe(recipe_folder).messages("a {{ rose }}")
    assert messages == [{"role": "user", "content": "Colour of a {{ rose }}?"}]


def test_the_student_reads_what_the_recipe_writes_and_nothing_else(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder)
    written = recipe.write_response("colour red", "red")
    assert written == "It is red."
    assert recipe.student_reader.read(written, "stop").answer == "red"
    assert recipe.student_reader.read("I say it is red.", "stop").rejection == "unparsable"
    assert recipe.student_reader.read("It is green.", "stop").rejection == "outside choices"


def test_a_raw_response_is_read_as_the_teacher_is(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "It is {{ answer }}.", "{{ text }}")
    recipe = load_recipe(recipe_folder)
    assert recipe.write_response(" so colour red ", "red") == "so colour red"
    assert recipe.student_reader == recipe.teacher_reader


def test_a_dumped_recipe_loads_with_the_same_digest(recipe_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_folder)
    recipe.dump(tmp_path / "copy")
    assert load_recipe(tmp_path / "copy").digest == recipe.digest


def test_the_digest_follows_what_changes_a_row_and_only_that(recipe_folder: Path) -> None:
    before = load_recipe(recipe_folder).digest
    edit(recipe_folder, "recipe.yaml", "Which colour", "What colour")
    assert load_recipe(recipe_folder).digest == before
    edit(recipe_folder, "prompt.md", "Name", "Tell")
    changed = load_recipe(recipe_folder).digest
    assert changed != before
    edit(recipe_folder, "queries.jsonl", "a rose", "one rose")
    assert load_recipe(recipe_folder).digest != changed


def test_a_pattern_without_the_group_answer_is_refused(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "?P<answer>", "?P<colour>")
    with pytest.raises(RecipeError, match=r"expected a group \(\?P<answer>"):
        load_recipe(recipe_folder)


def test_two_sources_of_queries_are_refused(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", "file: queries.jsonl, path: other")
    with pytest.raises(RecipeError, match="exactly one of file, hub, path, package"):
        load_recipe(recipe_folder)


def test_a_hub_source_without_a_revision_is_refused(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", "hub: me/queries")
    with pytest.raises(RecipeError, match="needs a revision"):
        load_recipe(recipe_folder)


def test_shares_that_do_not_add_up_are_refused(recipe_folder: Path) -> None:
    text = (recipe_folder / "recipe.yaml").read_text()
    (recipe_folder / "recipe.yaml").write_text(text + "split: {train: 0.9}\n")
    with pytest.raises(RecipeError, match="add up to 1, found 1.2"):
        load_recipe(recipe_folder)


def test_a_recipe_without_a_prompt_says_so(recipe_folder: Path) -> None:
    (recipe_folder / "prompt.md").unlink()
    with pytest.raises(RecipeError, match=r"has no prompt\.md"):
        load_recipe(recipe_folder)


def test_the_shares_of_many_groups_come_out_as_asked() -> None:
    split = SplitShares(train=0.6, validation=0.1, test=0.3)
    found = [split.of(f"group {number}") for number in range(5000)]
    assert abs(found.count("train") / 5000 - 0.6) < 0.03
    assert abs(found.count("test") / 5000 - 0.3) < 0.03


def test_replacing_a_field_validates_it(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder)
    assert recipe.replace(teacher="tinker:x").teacher == "tinker:x"
    assert isinstance(recipe.replace(teacher="tinker:x"), Recipe)


_ALONE = ["{{ answer }}", "{{answer}}", "{{ answer}}\n", "{{- answer }}"]


@pytest.mark.parametrize("template", _ALONE)
def test_a_response_that_is_the_answer_keeps_it_as_it_is(
    template: str, recipe_folder: Path
) -> None:
    said = " {{ text }} <é>\n"
    recipe = load_recipe(recipe_folder).replace(response=template)
    assert recipe.write_response("text", said) == said


def test_a_response_of_a_literal_is_that_literal(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder).replace(response="{{ 1 }}")
    assert recipe.write_response("text", "answer") == "1"
