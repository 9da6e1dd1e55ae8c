from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from tests.support.panels import JUDGE, KEYS, recipe_of


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
