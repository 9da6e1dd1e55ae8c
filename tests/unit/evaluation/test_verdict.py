"""Verdicts of rows made on purpose, how often rows that are drawn are called wrongly, and alerts.

Each failure made on purpose is called by its name; what is no failure is not.
"""

import json
from itertools import product
from math import comb
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from distill_datasets.evaluation.comparison import Comparison, Texts
from distill_datasets.evaluation.metrics import Metrics
from distill_datasets.evaluation.report_text import verdict_lines
from distill_datasets.evaluation.verdict import (
    DOES_NOT,
    OPEN,
    REPLACES,
    PairedRows,
    SystemRows,
    alerts_of,
    decide,
    find_alerts,
    judge_rows,
    main_metric,
)
from distill_datasets.statistics import mcnemar, paired, power
from tests.support.recipes import any_recipe


def right(both: int, teacher: int = 0, student: int = 0, neither: int = 0) -> PairedRows:
    """So many rows where both are right, one alone, or neither."""
    n = both + teacher + student + neither
    return PairedRows(
        "accuracy",
        [f"row{number}" for number in range(n)],
        [f"group{number}" for number in range(n)],
        [1.0] * (both + teacher) + [0.0] * (student + neither),
        [1.0] * both + [0.0] * teacher + [1.0] * student + [0.0] * neither,
    )


def grouped(rows: PairedRows, size: int) -> PairedRows:
    groups = [f"group{number // size}" for number in range(len(rows.ids))]
    return PairedRows(rows.metric, rows.ids, groups, rows.teacher, rows.student)


def test_a_student_that_is_as_right_as_the_teacher_replaces_the_prompt() -> None:
    found = decide(right(both=960, teacher=4, student=3, neither=33), 0.02)
    low, high = paired(3 / 1000, 4 / 1000, 1000, 0.9)
    assert found["outcome"] == REPLACES
    assert found["difference"] == {
        "value": pytest.approx(-0.001), "low": low, "high": high, "n": 1000, "level": 0.9,
    }  # fmt: skip
    assert low > -0.02
    assert found["only_teacher"] == ["row960", "row961", "row962", "row963"]
    assert found["only_student"] == ["row964", "row965", "row966"]
    assert found["rows_needed"] is None
    assert f"{low:+.4f}, is above -0.02" in found["rule"]
    assert found["p"] == mcnemar([1.0] * 3 + [-1.0] * 4)


def test_a_student_that_is_much_worse_does_not() -> None:
    found = decide(right(both=250, teacher=40, student=5), 0.02)
    assert (found["outcome"], found["rows_needed"]) == (DOES_NOT, None)
    assert "upper end" in found["rule"] and not found["student_better"]


def test_few_rows_are_not_enough_evidence_though_all_are_right() -> None:
    found = decide(right(both=60), 0.02)
    assert found["outcome"] == OPEN
    first, numbers, rule = verdict_lines(found)
    needed = found["rows_needed"]
    assert 0 <= int(first.split("about ")[1].split()[0].replace(",", "")) - needed <= 10
    assert first.startswith("Verdict: not enough evidence: about ")
    assert "student 1.000, teacher 1.000, difference +0.000 [-0.0" in numbers
    assert "holds -0.02" in rule
    # One row of 60 might differ: with so many more, equal systems are told in 80 % of cases.
    assert power(60 + needed, 0.02, 1 / 60) >= 0.8


def test_rows_are_counted_at_the_difference_where_equality_would_be_told_already() -> None:
    found = decide(right(both=1000, teacher=35, student=21), 0.02)
    assert found["outcome"] == OPEN
    assert found["rows_needed"] > 500
    near = decide(right(both=9_400, teacher=400, student=200), 0.02)
    assert (near["outcome"], near["rows_needed"]) == (OPEN, None)
    assert "so near that a million rows might not decide" in near["rule"]
    assert next(verdict_lines(near)) == "Verdict: not enough evidence."


@pytest.mark.parametrize("size", [5, 15])
def test_rows_of_a_group_are_worth_less(size: int) -> None:
    rows = right(both=300)
    assert decide(rows, 0.02)["outcome"] == REPLACES
    found = decide(grouped(rows, size), 0.02)
    assert (found["outcome"], found["groups"]) == (OPEN, 300 // size)
    assert found["difference"]["n"] == 300 / size
    assert (
        f"in {300 // size} groups, worth {300 // size} independent ones"
        in [*verdict_lines(found)][1]
    )
    # What is missing is counted in rows, of groups like these.
    alone = decide(right(both=300 // size), 0.02)
    assert found["rows_needed"] == alone["rows_needed"] * size


def test_rows_of_training_never_say_that_a_student_replaces_the_prompt() -> None:
    found = decide(right(both=900), 0.02, trained_on=True)
    assert (found["outcome"], found["rows_needed"]) == (OPEN, None)
    assert "trained on these very rows" in found["rule"]
    worse = decide(right(both=250, teacher=40, student=5), 0.02, trained_on=True)
    assert worse["outcome"] == DOES_NOT


def test_a_margin_that_is_wider_needs_fewer_rows() -> None:
    rows = right(both=95, teacher=3, student=2)
    needed = [decide(rows, margin)["rows_needed"] for margin in (0.01, 0.02, 0.05)]
    assert needed == sorted(needed, reverse=True) and needed[0] > 3 * needed[1]
    assert decide(rows, 0.2)["outcome"] == REPLACES


def test_scores_are_decided_by_their_mean() -> None:
    generator = np.random.default_rng(2)
    teacher = generator.beta(8, 2, 600)
    groups = [str(row) for row in range(600)]

    def of(student: Any) -> dict[str, Any]:
        scores = np.clip(student, 0, 1).tolist()
        return decide(PairedRows("chrf", groups, groups, teacher.tolist(), scores), 0.02)

    noise = generator.normal(0, 0.05, 600)
    assert of(teacher + noise)["outcome"] == REPLACES
    assert of(teacher + noise - 0.08)["outcome"] == DOES_NOT
    near = of(teacher + noise - 0.015)
    assert near["outcome"] == OPEN and near["rows_needed"] > 100
    assert near["p"] is None and near["only_teacher"] == []
    assert of(teacher * 0.2)["only_teacher"]


def test_rows_without_a_value_are_left_out() -> None:
    rows = PairedRows("checks", ["a", "b", "c"], ["a", "b", "c"], [1, None, 1], [1, 1, None])
    assert decide(rows, 0.02)["rows"] == 1
    none = decide(PairedRows("checks", ["a"], ["a"], [None], [1.0]), 0.02)
    assert (none["outcome"], none["difference"]) == (OPEN, None)
    assert none["rows_needed"] > 700 and "No row has a value" in [*verdict_lines(none)][1]


def test_a_metric_that_the_teacher_does_not_meet_can_not_tell() -> None:
    found = decide(right(both=0, neither=900), 0.02)
    assert (found["outcome"], found["rows_needed"]) == (OPEN, None)
    assert "The teacher itself reaches 0.000" in found["rule"]
    assert next(verdict_lines(found)) == "Verdict: not enough evidence."


def test_a_student_is_better_where_that_is_no_chance() -> None:
    assert decide(right(both=250, teacher=3, student=25), 0.02)["student_better"]
    assert not decide(right(both=250, teacher=3, student=6), 0.02)["student_better"]
    assert not decide(grouped(right(both=250, student=8), 129), 0.02)["student_better"]


def test_a_verdict_is_json() -> None:
    for rows in (right(both=1), right(both=30, teacher=1), right(both=0, student=2)):
        found = decide(rows, 0.02)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["difference"]["low"] < found["difference"]["high"]


@pytest.mark.parametrize("n", [157, 240])
@pytest.mark.parametrize("discordance", [0.02, 0.024])
def test_of_differences_that_are_the_margin_5_percent_at_most_replace(
    discordance: float, n: int
) -> None:
    """All outcomes that are no rarer than one in a thousand, with their chances."""
    rarer, more = (discordance - 0.02) / 2, (discordance + 0.02) / 2
    wrong = 0.0
    for up, down in product(range(4), range(16)):
        same = n - up - down
        chance = (
            comb(n, up) * comb(n - up, down) * rarer**up * more**down * (1 - discordance) ** same
        )
        if chance > 1e-3:
            wrong += chance * (decide(right(same, down, up), 0.02)["outcome"] == REPLACES)
    assert 0.005 < wrong <= 0.049


COLOURS = {"choices": ["red", "blue"]}


@pytest.mark.parametrize(
    ("keys", "references", "metric"),
    [
        ({"answer": COLOURS}, ["red", None], "accuracy"),
        ({"answer": COLOURS}, [None], "agreement"),
        ({"answer": COLOURS, "metrics": ["macro_f1", "agreement"]}, ["red"], "agreement"),
        ({"answer": COLOURS, "metrics": ["field_match"]}, ["x"], "field_match"),
        ({"answer": COLOURS, "metrics": ["answered"]}, ["red"], "chrf"),
        ({}, ["A whole text."], "chrf"),
        ({"checks": [{"name": "brief", "words": {"max": 9}}]}, [None], "checks"),
    ],
)
def test_the_first_metric_that_applies_decides(
    keys: dict[str, Any], references: list[str | None], metric: str
) -> None:
    assert main_metric(any_recipe(**keys), references) == metric


def test_the_margin_is_no_part_of_what_makes_rows() -> None:
    assert any_recipe().margin == 0.02
    assert any_recipe(margin=0.05).digest == any_recipe().digest
    with pytest.raises(ValueError, match="greater than 0"):
        any_recipe(margin=0)


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
    return Texts(Comparison(answers, Metrics({}), recipe))


def verdict(found: Texts, *, free_text: bool = False) -> dict[str, Any]:
    return judge_rows(found, free_text=free_text)


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


LABELS = ["red", "green", "blue", "grey"]
QUERIES = [f"What is the colour of the {thing} number {n}?" for n in range(10) for thing in "abcd"]
EXPECTED: list[str | None] = [LABELS[row % 4] for row in range(40)]
TEACHER = SystemRows([f"Colour: {label}" for label in EXPECTED], EXPECTED)


def alerts(student: SystemRows, **others: Any) -> list[str]:
    given = {"teacher": TEACHER, "queries": QUERIES, "references": EXPECTED, **others}
    systems = {"teacher": given.pop("teacher"), "student": student}
    if "base" in given:
        systems["base"] = given.pop("base")
    return find_alerts(systems, **given)


def test_a_good_student_has_none() -> None:
    assert alerts(TEACHER) == []
    mixed: list[str | None] = [*EXPECTED[:36], "red", "red", None, None]
    assert alerts(SystemRows([f"Colour: {label}" for label in mixed], mixed)) == []


def test_a_student_that_gives_one_answer_is_collapsed() -> None:
    (found,) = alerts(SystemRows(["Colour: red"] * 40, ["red"] * 40))
    assert found.startswith("Collapsed student: it says the same for 100% of the queries, like")
    assert "'Colour: red'" in found and "The teacher gives 4 different answers" in found


def test_one_answer_in_many_wordings_is_collapsed_too() -> None:
    texts = [f"Well, {query} I'd say red" for query in QUERIES]
    found = alerts(SystemRows(texts, ["red"] * 40))
    assert any(one.startswith("Collapsed student: it gives the same answer") for one in found)


@pytest.mark.parametrize(
    "texts",
    [
        ["I am not sure really."] * 40,
        ["the of and to a " * (1 + row % 7) for row in range(40)],
        [f"I am not sure but {row} may be, or {row + 1}" for row in range(40)],
    ],
)
def test_the_same_five_words_for_every_question_are_collapsed(texts: list[str]) -> None:
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Collapsed student: it ")


def test_the_same_words_as_free_text_are_collapsed_beside_a_varied_teacher() -> None:
    teacher = SystemRows([f"Story {n}: once upon a time {n}." for n in range(40)], QUERIES)
    texts = ["It is what it is."] * 39 + ["Something else."]
    base = SystemRows(["It is what it is."] * 40, ["It is what it is."] * 40)
    (found,) = alerts(SystemRows(texts, texts), teacher=teacher, references=[None] * 40, base=base)
    assert found.startswith("Collapsed student") and "98%" in found and "so does the base" in found


def test_a_student_that_says_one_thing_as_its_teacher_does_is_not_collapsed() -> None:
    same = SystemRows(["Colour: red"] * 40, ["red"] * 40)
    (found,) = alerts(same, teacher=same, references=[None] * 40)
    assert found.startswith("The teacher answers one thing: 'Colour: red' to 100%")


def test_right_labels_in_a_wrong_format_are_told_from_wrong_ones() -> None:
    texts = [f"It's surely {label}!" for label in EXPECTED]
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Right labels in a wrong format: in 40 of 40 rows")
    assert "\"It's surely red!\" for 'red'" in found
    wrong = [f"It's surely {LABELS[(row + 1) % 4]}!" for row in range(40)]
    assert alerts(SystemRows(wrong, [None] * 40)) == []
    every = [f"{row}: one of red, green, blue, grey" for row in range(40)]
    assert alerts(SystemRows(every, [None] * 40)) == []


def test_a_label_within_a_word_is_none() -> None:
    texts = [f"{row} greyish-reddened {label}s" for row, label in enumerate(EXPECTED)]
    assert alerts(SystemRows(texts, [None] * 40)) == []


def test_the_teachers_answers_are_the_labels_where_there_are_no_references() -> None:
    texts = [f"It's surely {label}!" for label in EXPECTED]
    (found,) = alerts(SystemRows(texts, [None] * 40), references=[None] * 40)
    assert found.startswith("Right labels in a wrong format")


@pytest.mark.parametrize("form", ["{}", "  {}\n", "user: {}", "{} The colour is"])
def test_a_student_that_copies_the_query_is_called_that(form: str) -> None:
    texts = [form.format(query) for query in QUERIES]
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Copies the query: the student's text repeats it in 40 of 40 rows")


def test_a_student_copies_as_little_as_a_teacher_that_corrects_texts() -> None:
    teacher = SystemRows(QUERIES, QUERIES)
    assert alerts(teacher, teacher=teacher, references=[None] * 40) == []


def test_a_piece_of_a_conversation_is_a_copy_too() -> None:
    queries = [f"user\nHello\n\nassistant\nHi\n\nuser\n{query}" for query in QUERIES]
    (found,) = alerts(SystemRows(QUERIES, [None] * 40), queries=queries)
    assert found.startswith("Copies the query")


def test_a_student_that_is_better_than_the_teacher_is_called_that() -> None:
    groups = [str(row) for row in range(40)]
    rows = PairedRows("accuracy", groups, groups, [0.0] * 12 + [1.0] * 28, [1.0] * 40)
    (found,) = alerts(TEACHER, verdict=decide(rows, 0.02))
    assert found.startswith("Better than the teacher: the student's accuracy is 1.000")
    rows = PairedRows("accuracy", groups, groups, [0.0] * 2 + [1.0] * 38, [1.0] * 40)
    assert alerts(TEACHER, verdict=decide(rows, 0.02)) == []


def test_of_few_rows_nothing_is_said() -> None:
    one = SystemRows(["Colour: red"] * 4, ["red"] * 4)
    assert find_alerts({"teacher": one, "student": one}, QUERIES[:4], EXPECTED[:4]) == []
