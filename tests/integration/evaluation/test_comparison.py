import json
from typing import Any

import pytest
from datasets import Dataset

from distill_datasets.evaluation.comparison import Comparison
from distill_datasets.evaluation.metrics import Metrics
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import paired, wilson

SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string"}, "sure": {"type": "number"}},
    "required": ["label"],
}


def recipe(**keys: Any) -> Recipe:
    fields = {
        "name": "colours",
        "description": "x",
        "teacher": "openai:x",
        "queries": {"hub": "me/colours", "revision": "v1", "reference": "colour"},
        "prompt": "Name the colour.",
        "response": "{{ text }}",
    }
    return Recipe(**{**fields, **keys})


def comparison(
    asked: Recipe, references: list[str | None], metrics: tuple[str, ...] = (), **said: list[str]
) -> Comparison:
    """What systems said to queries, read as `measure` reads it."""
    answers = {}
    for system, texts in said.items():
        reader = asked.teacher_reader if system == "teacher" else asked.student_reader
        rows = [
            {
                "query": f"q{number}",
                "group": f"q{number}",
                "reference": reference,
                "raw": text,
                "stop_reason": "stop",
                "answer": reader.read(text, "stop").answer,
            }
            for number, (text, reference) in enumerate(zip(texts, references, strict=True))
        ]
        answers[system] = Dataset.from_list(rows)
    return Comparison(answers, Metrics.load(metrics, (), references), asked)


def test_a_check_is_the_share_of_the_rows_that_it_applies_to() -> None:
    checks = [
        {"name": "brief", "words": {"max": 2}},
        {"name": "asks", "when": "none", "ends_with": "?"},
        {"name": "idle", "when": "never there", "ends_with": "?"},
    ]
    found = comparison(
        recipe(checks=checks),
        ["none", "none", "red", None],
        teacher=["Which?", "Which one?", "red", "it is red"],
        student=["Which?", "red", "red", "red"],
        base=["I do not know", "Which?", "so very red", "hm"],
    )
    low, high = wilson(3 / 4, 4)
    assert found.checks_of("teacher") == {
        "brief": {"value": 0.75, "low": low, "high": high, "n": 4, "rows": 4},
        "asks": {"value": 1.0, "low": wilson(1.0, 2)[0], "high": 1.0, "n": 2, "rows": 2},
    }
    assert found.checks_of("student")["asks"]["value"] == 0.5
    apart = found.check_differences()
    low, high = paired(0.25, 0.0, 4)
    assert apart["student-teacher"]["brief"] == {"value": 0.25, "low": low, "high": high, "n": 4}
    assert apart["student-teacher"]["asks"]["value"] == -0.5
    assert apart["student-base"]["asks"]["value"] == 0.0
    assert "idle" not in apart["student-teacher"]
    assert any(note == "These checks apply to no row here: idle." for note in found.notes())


def test_two_systems_are_compared_on_the_rows_where_a_check_says_something_of_both() -> None:
    german = "Das ist ein ganz gewöhnlicher deutscher Satz."
    english = "This is a very ordinary English sentence."
    found = comparison(
        recipe(checks=[{"name": "german", "language": "de"}]),
        [None, None, None],
        teacher=[german, german, "Ja"],
        student=[german, "Nein", english],
        base=[english, english, english],
    )
    assert [found.checks_of(name)["german"]["rows"] for name in ("teacher", "student")] == [2, 2]
    assert found.check_differences()["student-teacher"]["german"]["value"] == 0.0
    assert found.check_differences()["student-base"]["german"]["value"] == 0.5


def test_a_recipe_without_checks_has_none_of_their_numbers() -> None:
    found = comparison(recipe(), ["red"], teacher=["red"], student=["red"], base=["red"])
    assert found.checks_of("student") == found.check_differences() == {}


def said(label: str, sure: float | None = None) -> str:
    return json.dumps({"label": label, **({} if sure is None else {"sure": sure})})


def test_confidence_is_measured_where_a_system_states_one() -> None:
    asked = recipe(
        answer={"json_schema": SCHEMA, "field": "label", "confidence": "sure"},
        metrics=["accuracy", "ece", "brier"],
    )
    found = comparison(
        asked,
        ["red", "blue", "red"],
        asked.metrics,
        teacher=[said("red", 0.8), said("red", 0.6), said("red")],
        student=[said("red", 0.5), said("blue", 0.5), said("red", 0.9)],
        base=[said("red"), said("red", 80), "no idea"],
    )
    assert found.confidences["teacher"] == [0.8, 0.6, None]
    assert found.confidences["base"] == [None, None, None]
    teacher, student = found.metrics_of("teacher"), found.metrics_of("student")
    assert teacher["brier"]["value"] == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert teacher["ece"]["value"] == pytest.approx((0.2 + 0.6) / 2)
    assert student["brier"]["value"] == pytest.approx((0.5**2 + 0.5**2 + 0.1**2) / 3)
    assert "brier" not in found.metrics_of("base")
    # On the two rows where both are confident.
    assert found.differences()["student-teacher"]["brier"]["value"] == pytest.approx(0.25 - 0.2)
    (note,) = [note for note in found.notes() if note.startswith("ece and brier")]
    assert "teacher 2, student 3, base 0 of 3" in note


def test_calls_of_one_tool_are_one_label_whatever_their_arguments(tmp_path: Any) -> None:
    parameters = {"type": "object", "properties": {"id": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    asked = recipe(tools="tools.json", folder=tmp_path, response="{{ answer }}")

    def call(number: int) -> str:
        return json.dumps([{"name": "find", "arguments": {"id": number}}])

    def text(number: int) -> str:
        return f'<tool_call>\n{{"name": "find", "arguments": {{"id": {number}}}}}\n</tool_call>'

    found = comparison(
        asked,
        [call(1), call(2), "[]"],
        teacher=[text(1), text(2), "Which one?"],
        student=[text(1), text(3), "Which one?"],
        base=["Sure!", "Sure!", text(1)],
    )
    assert found.labels() == {
        "find": {"n": 2, "teacher": 1.0, "student": 0.5, "base": 0.0},
        "no call": {"n": 1, "teacher": 1.0, "student": 1.0, "base": 0.0},
    }


def test_rows_in_groups_say_how_many_independent_ones_they_are_worth() -> None:
    found = comparison(
        recipe(),
        ["red"] * 6,
        ("accuracy",),
        teacher=["red"] * 6,
        student=["red"] * 6,
        base=["x"] * 6,
    )
    (note,) = [note for note in found.notes() if note.startswith("Intervals")]
    assert "independent" not in note
    grouped = {
        system: rows.remove_columns("group").add_column("group", ["a", "a", "a", "b", "b", "b"])
        for system, rows in found.answers.items()
    }
    (note,) = [
        note
        for note in Comparison(grouped, found.metrics, found.recipe).notes()
        if note.startswith("Intervals")
    ]
    assert "The 6 rows are of 2 groups of related ones, and worth 2 independent rows" in note


def test_labels_on_which_student_and_teacher_differ_are_named_where_rows_are_enough() -> None:
    right = ["red"] * 30 + ["blue"] * 30 + ["grey"] * 5
    found = comparison(
        recipe(),
        right,
        ("accuracy",),
        teacher=right,
        student=["blue"] * 12 + right[12:],
        base=right,
    )
    assert found.subgroups["grey"] == {"rows": 5, "note": "too few"}
    assert found.subgroups["red"]["significant"] and not found.subgroups["blue"]["significant"]
    (note,) = [note for note in found.notes() if note.startswith("By label")]
    assert note.startswith(
        "By label, student and teacher differ beyond chance on red (-0.400, p 0.0"
    )
    assert "of the 2 with 20 rows or more" in note and "too few rows: 1 others" in note
    few = comparison(recipe(), ["red"], teacher=["red"], student=["red"], base=["red"])
    assert few.subgroups == {} and not [one for one in few.notes() if one.startswith("By label")]
