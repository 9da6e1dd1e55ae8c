"""A recipe: its digest, its splits, its students, and how an answer is chosen."""

from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe, shipped_recipes
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SplitShares
from tests import reference
from tests.conftest import edit
from tests.support.panels import JUDGE, KEYS, recipe_of


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


def test_a_recipe_of_several_teachers_is_dumped_with_its_judge_and_the_same_digest(
    tmp_path: Path,
) -> None:
    hot = {"model": "red", "sampling": {"temperature": 0.0}}
    keys = {**KEYS["best"], "teachers": [hot, "blue"], "sampling": {"temperature": 0.7}}
    recipe = load_recipe(recipe_of(tmp_path / "recipe", **keys))
    recipe.dump(tmp_path / "copy")
    copy = load_recipe(tmp_path / "copy")
    assert copy.digest == recipe.digest
    assert copy.sampling_of(copy.all_teachers[0]).temperature == 0.0
    assert copy.judge_prompt == JUDGE


@pytest.mark.parametrize(
    "change",
    [
        {"teachers": [{"model": "red", "weight": 2}, "right", "blue"]},
        {"choose": "majority", "verifier": None, "judge": None},
        {"verifier": "answer"},
        {"judge": {"model": "judge", "scale": [0, 10]}},
        {"template": JUDGE + "!"},
    ],
)
def test_whatever_changes_the_choice_changes_the_digest(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    before = load_recipe(recipe_of(tmp_path / "before", **KEYS["best"])).digest
    after = load_recipe(recipe_of(tmp_path / "after", **{**KEYS["best"], **change})).digest
    assert after != before


def test_the_keys_of_a_choice_that_is_not_made_leave_the_digest_as_it_was(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, teacher="red"))
    written = {"choose": "route", "agreement": None, "verifier": None, "judge": None}
    assert Recipe(**{**dict(recipe), **written}).digest == recipe.digest
    assert "choose" not in recipe.model_dump(mode="json", exclude_defaults=True)


TWO = ["red", "blue"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "exactly one of teacher and teachers; found neither"),
        ({"teacher": "red", "teachers": TWO}, "exactly one of teacher and teachers; found both"),
        ({"teachers": TWO, "renderer": "plain"}, "its own renderer: move it there"),
        ({"teachers": ["red", "red"]}, "teachers 1 and 2 are the same"),
        ({"teachers": [{"model": "red", "wieght": 2}]}, "Did you mean 'weight'"),
        ({"teachers": [{"model": "red", "weight": 0}, "blue"]}, "teachers.0.weight"),
        (
            {"teachers": [{"model": "red", "sampling": {"temprature": 1}}]},
            r"'teachers\.0\.sampling\.temprature'. Did you mean 'temperature'",
        ),
        ({"teachers": TWO, "choose": "vote"}, "choose: Input should be"),
        ({"teachers": TWO, "agreement": 0.6}, "agreement needs 'choose: majority'"),
        ({"teachers": TWO, "choose": "majority", "agreement": 60}, "agreement: "),
        ({"teachers": TWO, "verifier": "answer"}, "verifier needs 'choose: best'"),
        ({"teachers": TWO, "choose": "majority", "judge": "j"}, "judge needs 'choose: best'"),
        ({"teacher": "red", "choose": "majority"}, "needs several answers.*raise sampling.n"),
        ({"teacher": "red", "choose": "best"}, "needs several answers.*verifier or a judge"),
        ({"teachers": TWO, "choose": "best", "verifier": "answr"}, "Did you mean 'answer'"),
        ({"teachers": TWO, "choose": "best", "verifier": "answer }} {{"}, "not a Jinja expression"),
        ({"teachers": TWO, "choose": "best", "judge": "j"}, "'judge.md', which .* lacks"),
        (
            {"teachers": TWO, "choose": "best", "judge": {"model": "j", "prompt": "../x.md"}},
            "expected a file in the recipe's folder",
        ),
        (
            {"teachers": TWO, "choose": "best", "judge": {"model": "j", "pattern": r"\d"}},
            r"expected a group \(\?P<score>",
        ),
        (
            {"teachers": TWO, "choose": "best", "judge": {"model": "j", "scale": [5, 1]}},
            "scale goes from low to high",
        ),
        (
            {"teachers": TWO, "choose": "best", "judge": {"model": "j", "sampling": {"n": 2}}},
            "a judge gives one score",
        ),
        (
            {"teachers": TWO, "choose": "best", "judge": "j", "template": "{{ anser }}"},
            "judge.md uses the unknown field 'anser'. Did you mean 'answer'",
        ),
        ({"teachers": TWO, "choose": "best", "judge": "j", "template": " "}, "judge.md is empty"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_is_asked(
    tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe_of(tmp_path, **keys))


def test_the_page_lists_every_key_as_the_sections_have_it() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        "make it anew: python -m tests.reference"
    )
