from typing import Any

from datasets import Dataset

from distill_datasets.evaluation.comparison import Comparison, Texts
from distill_datasets.evaluation.metrics import Metrics
from distill_datasets.evaluation.verdict import alerts_of, judge_rows
from tests.support.recipes import any_recipe


def texts(
    said: dict[str, list[str]], references: list[str | None] | None = None, **keys: Any
) -> Texts:
    recipe = any_recipe(**{"response": "{{ text }}", **keys})
    answers = {
        system: Dataset.from_list(
            [
                {
                    "id": f"r{row}",
                    "query": f"query {row}",
                    "group": f"g{row}",
                    "reference": references[row] if references else None,
                    "raw": text,
                    "stop_reason": "stop",
                    "answer": recipe.teacher_reader.read(text, "stop").answer,
                }
                for row, text in enumerate(given)
            ]
        )
        for system, given in said.items()
    }
    return Texts(Comparison(answers, Metrics({}), recipe), recipe)


def verdict(found: Texts, *, free_text: bool = False) -> dict[str, Any]:
    return judge_rows(found, found._recipe, free_text=free_text)


CHOICES = {"answer": {"choices": ["a", "b", "c"]}}


def test_labels_are_judged_by_the_references() -> None:
    said = {"teacher": ["a", "b", "c", "a"], "student": ["a", "b", "b", "a"]}
    found = verdict(texts(said, ["a", "b", "c", None], **CHOICES))
    assert (found["metric"], found["rows"]) == ("accuracy", 3)
    assert (found["teacher"], found["student"]) == (1.0, 2 / 3)
    assert found["only_teacher"] == ["r2"]


def test_references_that_are_labels_decide_where_no_form_is_said() -> None:
    said = {"teacher": ["a", "b"] * 2, "student": ["a", "a"] * 2}
    assert verdict(texts(said, ["a", "b"] * 2))["metric"] == "accuracy"


def test_without_references_labels_are_judged_by_agreement_with_the_teacher() -> None:
    said = {"teacher": ["a", "b", "?"], "student": ["a", "c", "a"]}
    found = verdict(texts(said, **CHOICES))
    assert (found["metric"], found["rows"]) == ("agreement", 2)
    assert (found["teacher"], found["student"]) == (1.0, 0.5)
    again = verdict(texts({**said, "teacher again": ["b", "b", "a"]}, **CHOICES))
    assert (again["teacher"], again["student"]) == (0.5, 0.5)


def test_checks_are_judged_by_the_share_that_a_row_passes() -> None:
    checks = [{"name": "short", "words": {"max": 2}}, {"name": "asks", "ends_with": "?"}]
    said = {"teacher": ["How so?", "Why?"], "student": ["How so?", "It is so, you know"]}
    found = verdict(texts(said, checks=checks), free_text=True)
    assert (found["metric"], found["teacher"], found["student"]) == ("checks", 1.0, 0.5)


def test_fields_are_judged_by_the_share_that_is_equal() -> None:
    form = {"answer": {"json_schema": {"type": "object"}}, "metrics": ["field_match"]}
    right: list[str | None] = ['{"a": 1, "b": 2}', None]
    said = {"teacher": [right[0] or "", "{}"], "student": ['{"a": 1, "b": 3}', "{}"]}
    found = verdict(texts(said, right, **form))
    assert (found["metric"], found["student"], found["rows"]) == ("field_match", 0.5, 1)


def test_texts_are_judged_by_the_teachers_second_answer_or_not_at_all() -> None:
    said = {"teacher": ["one text", "other text"], "student": ["one text", "no"]}
    without = verdict(texts(said), free_text=True)
    assert without["outcome"] == "not enough evidence" and without["rows_needed"] is None
    assert "only a second answer of the teacher says" in without["rule"]
    second = {**said, "teacher again": ["one text", "other texts"]}
    found = verdict(texts(second), free_text=True)
    assert found["metric"] == "chrf" and found["teacher"] > found["student"] > 0.5
    assert f"second answer is {found['teacher']:.3f} like its first" in found["rule"]


def test_a_student_nearer_to_the_teacher_than_its_second_answer_is_not_called_better() -> None:
    words = [f"the answer number {row} is here" for row in range(60)]
    said = {"teacher": words, "teacher again": ["nothing alike"] * 60, "student": words}
    found = verdict(texts(said), free_text=True)
    assert found["outcome"] == "replaces the prompt" and not found["student_better"]
    labels = {"teacher": ["a", "b"] * 40, "teacher again": ["b", "a"] * 40}
    found = verdict(texts({**labels, "student": ["a", "b"] * 40}, **CHOICES))
    assert found["metric"] == "agreement" and not found["student_better"]


def test_texts_with_references_are_judged_by_them() -> None:
    said = {"teacher": ["one", "two"], "student": ["one", "two"]}
    found = verdict(texts(said, ["one", "too"]), free_text=True)
    assert found["metric"] == "chrf" and found["teacher"] == found["student"] < 1.0


def test_what_systems_say_and_are_read_as_raises_alerts() -> None:
    labels = ["a", "b", "c"] * 4
    said = {"teacher": labels, "student": [f"I think {one}!" for one in labels]}
    found = texts(said, [*labels], **CHOICES)
    (alert,) = alerts_of(found, verdict(found))
    assert alert.startswith("Right labels in a wrong format: in 12 of 12 rows")
