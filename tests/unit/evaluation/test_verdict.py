"""Verdicts of rows made on purpose, and how often rows that are drawn are called wrongly."""

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import multinomial

from distill_datasets.evaluation.report_text import verdict_lines
from distill_datasets.evaluation.verdict import (
    DOES_NOT,
    OPEN,
    REPLACES,
    PairedRows,
    decide,
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
    up, down = np.meshgrid(np.arange(4), np.arange(16))
    shares = [(discordance - 0.02) / 2, (discordance + 0.02) / 2, 1 - discordance]
    counts = np.stack([up, down, n - up - down], axis=-1).reshape(-1, 3)
    chances = multinomial.pmf(counts, n, shares)
    wrong = 0.0
    for (up, down, same), chance in zip(counts.tolist(), chances.tolist(), strict=True):
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
