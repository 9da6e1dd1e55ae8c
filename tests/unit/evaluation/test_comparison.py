from functools import partial
from typing import Any

import pytest
from datasets import Dataset

from distill_datasets.evaluation import metrics
from distill_datasets.evaluation.comparison import Comparison, Texts, metric_names
from distill_datasets.evaluation.metrics import Metrics, chrf
from distill_datasets.evaluation.systems import is_free_text
from distill_datasets.recipes.recipe import Recipe
from tests.support.recipes import any_recipe

recipe = partial(any_recipe, response="{{ text }}")


def texts(
    asked: Recipe,
    references: list[str | None] | None = None,
    ended: str = "stop",
    **said: list[str],
) -> Texts:
    """What systems said, read as `measure` reads it; names have underscores for spaces."""
    answers = {}
    for name, given in said.items():
        system = name.replace("_and_", " + ").replace("_", " ")
        prompted = system.startswith("teacher") or "prompt" in system
        reader = asked.teacher_reader if prompted else asked.student_reader
        right = references or [None] * len(given)
        answers[system] = Dataset.from_list(
            [
                {
                    "query": f"q{row}",
                    "group": f"q{row}",
                    "reference": right[row],
                    "raw": text,
                    "stop_reason": ended if system == "student" else "stop",
                    "answer": reader.read(text, "stop").answer,
                }
                for row, text in enumerate(given)
            ]
        )
    return Texts(Comparison(answers, Metrics({}), asked))


def test_texts_are_compared_with_the_teachers_row_by_row() -> None:
    found = texts(
        recipe(), teacher=["the cat", "the dog"], student=["the cat", "a dog"], base=["?", "?"]
    )
    section = found.section()
    alike = section["student"]["teacher"]
    assert alike["chrf"]["value"] == pytest.approx((1 + chrf("a dog", "the dog")) / 2)
    assert alike["rouge_l"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert alike["exact_match"]["value"] == 0.5
    assert alike["chrf"]["rows"] == 2
    assert "teacher" not in section["teacher"] and "reference" not in section["student"]
    assert section["student"]["length_ratio"]["value"] == pytest.approx(12 / 14)


def test_each_text_is_cut_into_its_runs_and_words_once_whoever_it_is_compared_with() -> None:
    teacher, base, student = ([f"{name} {row}" for row in range(100)] for name in "tbs")
    known = (metrics._runs, metrics._words)
    for one in known:
        one.cache_clear()
    assert texts(recipe(), teacher=teacher, base=base, student=student).scores
    assert [one.cache_info().misses for one in known] == [300, 300]


def test_a_teachers_answer_is_compared_as_the_student_would_say_it() -> None:
    asked = recipe(answer={"pattern": "colour: (?P<answer>\\w+)"}, response="It is {{ answer }}.")
    found = texts(
        asked,
        ["red", "red"],
        teacher=["Hm. colour: red", "colour: blue"],
        teacher_again=["colour: red", "I do not know"],
        student=["It is red.", "It is red."],
        base_and_prompt=["well, colour: red", "colour: blue"],
    )
    assert found.said["teacher"] == ["It is red.", "It is blue."]
    assert found.said["teacher again"] == ["It is red.", "I do not know"]
    same = {
        name: section["teacher"]["exact_match"]["value"]
        for name, section in found.section().items()
        if "teacher" in section
    }
    assert same == {"teacher again": 0.5, "student": 0.5, "base + prompt": 1.0}
    assert found.section()["student"]["reference"]["exact_match"]["value"] == 1.0


def test_rows_without_a_usable_answer_of_the_teacher_are_left_out() -> None:
    asked = recipe(answer={"choices": ["red", "blue"]})
    found = texts(asked, teacher=["red", "so sorry"], student=["red", "blue"])
    assert found.section()["student"]["teacher"]["exact_match"]["rows"] == 1
    assert found.section()["student"]["length_ratio"]["rows"] == 1
    none = texts(asked, teacher=["so sorry"], student=["red"])
    assert {"teacher", "length_ratio"} & none.section()["student"].keys() == set()


def test_a_student_that_says_one_thing_and_never_ends_is_seen() -> None:
    same = ["five words that say nothing"] * 4
    found = texts(recipe(), ended="length", teacher=["a", "b", "c", "d"], student=same).section()
    assert found["student"]["distinct"] == 1
    assert found["student"]["commonest"] == same[0]
    assert found["student"]["commonest_rows"] == 4
    assert found["student"]["commonest_share"]["low"] < 1.0
    assert found["student"]["ended"]["value"] == 0.0
    assert found["teacher"]["ended"]["value"] == 1.0


def test_the_student_is_compared_with_the_teachers_second_answer() -> None:
    found = texts(
        recipe(),
        teacher=["the cat sat", "the dog ran"],
        teacher_again=["the cat sat", "a dog ran"],
        student=["cats", "dogs"],
        base=["the cat", "dogs"],
    )
    apart = found.differences()
    assert apart.keys() == {"student-base", "student-teacher again"}
    assert apart["student-teacher again"]["chrf"]["value"] < 0
    assert apart["student-base"]["exact_match"]["value"] == 0.0


LABELLED: list[str | None] = ["en", "de", "en", "de"]
TEXTS: list[str | None] = ["One.", "Two.", None, "Three."]


@pytest.mark.parametrize(
    ("keys", "references", "free"),
    [
        ({}, [None, None], True),
        ({}, TEXTS, True),
        ({}, LABELLED, False),
        ({"answer": {"choices": ["a"]}}, TEXTS, False),
        ({"answer": {"pattern": "(?P<answer>.+)"}}, TEXTS, False),
        ({"answer": {"json_schema": {"type": "object"}}}, TEXTS, False),
    ],
)
def test_free_text_has_no_form_and_no_labels(
    keys: Any, references: list[str | None], free: bool
) -> None:
    assert is_free_text(recipe(**keys), references) == free


def test_a_recipe_of_free_text_has_no_metrics_of_labels_unless_it_names_them() -> None:
    assert metric_names(recipe(), TEXTS) == (["chrf", "rouge_l"], ["answered"])
    assert metric_names(recipe(metrics=["accuracy"]), TEXTS)[0] == ["accuracy"]
    assert metric_names(recipe(), LABELLED)[1] == ["answered", "agreement"]
