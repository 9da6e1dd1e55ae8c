"""How much of the prompt is in the weights: the number, and where it stands in a report."""

from dataclasses import replace
from pathlib import Path

import pytest

from distill_datasets.errors import DatasetError
from distill_datasets.models.connection import connect
from distill_datasets.training.internalisation import (
    Answered,
    Bounds,
    internalisation,
    measure_internalisation,
    per_token,
)
from distill_datasets.training.student import Adapted, Student
from tests.unit.evaluation.test_report import compare, make_run

BOUNDS = Bounds(groups=["a", "b", "c"], tokens=[2, 2, 4], base=[8.0, 6.0, 10.0], teacher=[1, 1, 2])


def test_the_base_scores_nothing_and_the_teacher_everything() -> None:
    assert internalisation(BOUNDS.base, BOUNDS).value == 0
    assert internalisation(BOUNDS.teacher, BOUNDS).value == 1


def test_the_score_is_the_share_of_the_gap_that_is_closed() -> None:
    found = internalisation([2.0, 2.0, 5.0], BOUNDS)
    assert found.value == pytest.approx((24 - 9) / (24 - 4))
    assert per_token([2.0, 2.0, 5.0], BOUNDS) == pytest.approx(9 / 8)
    interval = found.interval()
    assert interval["low"] < found.value < interval["high"]


def test_nothing_is_clipped() -> None:
    assert internalisation([0.5, 0.5, 1.0], BOUNDS).value == pytest.approx(22 / 20)
    assert internalisation([9.0, 9.0, 16.0], BOUNDS).value == pytest.approx(-10 / 20)


def test_rows_of_one_group_are_drawn_together() -> None:
    one = Bounds(["a", "a", "a"], BOUNDS.tokens, BOUNDS.base, BOUNDS.teacher)
    interval = internalisation([2.0, 2.0, 5.0], one).interval()
    assert interval["low"] == interval["high"] == pytest.approx(0.75)


def test_an_answer_that_the_prompt_makes_no_likelier_leaves_nothing_to_internalise() -> None:
    """Two requests for one probability differ by a rounding, which is no difference."""
    rounded = [nats - 1e-5 for nats in BOUNDS.base]
    for teacher in (BOUNDS.base, rounded, [9.0, 7.0, 11.0]):
        with pytest.raises(DatasetError, match="found 3.0000 nats a token without it, and"):
            internalisation(
                [1.0, 1.0, 1.0], Bounds(BOUNDS.groups, BOUNDS.tokens, BOUNDS.base, teacher)
            )
    with pytest.raises(DatasetError, match="no answers"):
        internalisation([], Bounds([], [], [], []))


ANSWERS = [
    Answered(
        group=query,
        asked=[{"role": "system", "content": "One word."}, {"role": "user", "content": query}],
        said="en",
        query=[{"role": "user", "content": query}],
        response="The answer is en and nothing else at all.",
    )
    for query in ("the weather", "hello", "one two")
]


def test_the_score_of_three_models_is_made_of_their_likelihoods(model: str) -> None:
    """The student is the base with new weights, which change nothing: it scores 0."""
    base = connect(model)
    path = Student.create(base, Adapted(rank=4)).save("new").result().sampler
    found = measure_internalisation(
        ANSWERS, {"base": base, "teacher": base, "student": replace(base, model_path=path)}
    )
    assert found is not None
    assert found["value"] == pytest.approx(0, abs=1e-4)
    nats = found["nats_per_token"]
    assert nats["student"] == pytest.approx(nats["base"], abs=1e-4)
    assert nats["teacher"] < nats["base"]
    assert found["rows"] == 3


def test_what_is_not_defined_is_said_and_left_out(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [replace(one, asked=one.query, said=one.response) for one in ANSWERS]
    base = connect(model)
    assert (
        measure_internalisation(same, dict.fromkeys(("base", "teacher", "student"), base)) is None
    )
    assert "measure: The internalisation score is not defined" in capsys.readouterr().err


def test_a_report_has_none_where_a_system_can_not_score(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert compare(run).data["internalisation"] is None
