import pytest

from distill_datasets.errors import DatasetError
from distill_datasets.internalisation import Bounds, internalisation, per_token

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


def test_a_prompt_that_changes_nothing_leaves_nothing_to_internalise() -> None:
    same = Bounds(BOUNDS.groups, BOUNDS.tokens, BOUNDS.base, BOUNDS.base)
    with pytest.raises(DatasetError, match="not defined: the base finds"):
        internalisation([1.0, 1.0, 1.0], same)
    with pytest.raises(DatasetError, match="no answers"):
        internalisation([], Bounds([], [], [], []))
