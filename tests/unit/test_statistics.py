"""Intervals against numbers computed elsewhere."""

import json

import numpy as np
import pytest

from distill_datasets.statistics import (
    Bootstrap,
    Proportion,
    effective_rows,
    intraclass_correlation,
    paired,
    resamples,
    wilson,
)


def alone(count: int) -> list[str]:
    """Groups of one row each."""
    return [str(row) for row in range(count)]


# `statsmodels.stats.proportion.proportion_confint(count, n, method="wilson")`, version 0.15.
WILSON = [
    (315, 315, 0.9879518215, 1.0),
    (314, 315, 0.9822397269, 0.9994393846),
    (300, 400, 0.7053228671, 0.7899209858),
    (7, 8, 0.5291118178, 0.9775825085),
    (3, 4, 0.3006418426, 0.9544127392),
    (0, 8, 0.0, 0.3244075649),
    (1, 1, 0.2065493144, 1.0),
]


@pytest.mark.parametrize(("count", "n", "low", "high"), WILSON)
def test_the_interval_of_a_share_is_wilsons(count: int, n: int, low: float, high: float) -> None:
    rows = [1.0] * count + [0.0] * (n - count)
    found = Proportion(rows, alone(n)).interval()
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-9)
    assert found["value"] == count / n


@pytest.mark.parametrize(("count", "n"), [(0, 1), (5, 9), (39, 40), (1000, 1000)])
def test_scipy_finds_the_same_interval(count: int, n: int) -> None:
    from scipy.stats import binomtest

    theirs = binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# `statpsych::ci.prop.ps(.05, 12, 4, 26, 6)` in its manual: 26 and 4 of 48 where one is right alone;
# `contingencytables::Wald_CI_BonettPrice_paired_2x2(rbind(c(1, 1), c(7, 12)))`: 1 and 7 of 21.
@pytest.mark.parametrize(
    ("up", "down", "n", "low", "high"),
    [(26, 4, 48, 0.2548067, 0.6251933), (1, 7, 21, -0.5083593, -0.0133798)],
)
def test_the_interval_of_a_paired_difference_is_bonett_and_prices(
    up: int, down: int, n: int, low: float, high: float
) -> None:
    assert paired(up / n, down / n, n) == pytest.approx((low, high), abs=1e-6)
    first = [1.0] * up + [0.0] * (n - up)
    second = [0.0] * up + [1.0] * down + [0.0] * (n - up - down)
    found = (Proportion(first, alone(n)) - Proportion(second, alone(n))).interval()
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    assert found["value"] == pytest.approx((up - down) / n)


def test_the_likeness_within_groups_is_shrout_and_fleiss() -> None:
    """Their table of 1979: six targets, four judges; ICC(1, 1) is .17."""
    ratings = [
        [9, 2, 5, 8],
        [6, 1, 3, 2],
        [8, 4, 6, 8],
        [7, 1, 2, 6],
        [10, 5, 6, 9],
        [6, 2, 4, 7],
    ]
    values = [float(rating) for row in ratings for rating in row]
    groups = [str(target) for target in range(6) for _ in range(4)]
    assert intraclass_correlation(values, groups) == pytest.approx(0.1657, abs=1e-4)


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 2, 3, 6), (9, 1, 1, 1)])
@pytest.mark.parametrize("right", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)])
def test_groups_whose_rows_all_agree_count_once(
    sizes: tuple[int, ...], right: tuple[int, ...]
) -> None:
    groups = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    values = [float(right[int(group)]) for group in groups]
    assert effective_rows(values, groups) == pytest.approx(4)
    share = sum(values) / len(values)
    found = Proportion(values, groups).interval()
    assert (found["low"], found["high"]) == pytest.approx(wilson(share, 4))


def test_groups_whose_rows_are_as_unlike_as_any_count_by_the_row() -> None:
    groups = [str(row // 2) for row in range(40)]
    assert effective_rows([1.0, 0.0] * 20, groups) == 40
    assert effective_rows([1.0, 0.0] * 20, alone(40)) == 40


def test_one_group_is_one_row() -> None:
    assert effective_rows([1.0, 0.0, 1.0], ["a", "a", "a"]) == 1


@pytest.mark.parametrize("rows", [[1.0] * 315, [0.0] * 315, [1.0], [0.0], [1.0, 0.0]])
def test_no_interval_is_without_width(rows: list[float]) -> None:
    share = Proportion(rows, alone(len(rows)))
    for found in (share.interval(), (share - share).interval()):
        assert found["low"] <= found["value"] <= found["high"]
        assert found["low"] < found["high"]


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    first = Proportion([1.0] * 200 + [0.0] * 100, alone(300))
    second = Proportion([1.0] * 210 + [0.0] * 90, alone(300))
    found = (second - first).interval()
    apart = [end["high"] - end["low"] for end in (first.interval(), second.interval())]
    assert found["value"] == pytest.approx(10 / 300)
    assert found["high"] - found["low"] < 0.5 * sum(apart)


def test_draws_that_are_all_alike_have_the_interval_of_a_share() -> None:
    same = Bootstrap(1.0, np.ones(100), 12)
    found = same.interval()
    assert (found["low"], found["high"]) == pytest.approx(wilson(1.0, 12))
    found = (same - same).interval()
    assert (found["low"], found["high"]) == pytest.approx(paired(0, 0, 12))


def test_where_nothing_is_known_of_its_range_a_value_stands_alone() -> None:
    assert Bootstrap(7.5, np.full(100, 7.5)).interval() == {"value": 7.5}


def test_no_interval_is_made_of_draws_that_are_no_numbers() -> None:
    draws = np.append(np.arange(98.0), [np.nan, np.inf])
    found = Bootstrap(50.0, draws).interval()
    assert 0 < found["low"] < found["high"] < 98
    for many in (np.full(100, np.nan), np.append(np.arange(90.0), np.full(10, np.inf))):
        found = Bootstrap(50.0, many).interval()
        assert json.loads(json.dumps(found, allow_nan=False)) == {"value": 50.0}


def test_weights_in_several_chunks_still_draw_as_many_groups_as_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_datasets.statistics._CELLS", 20)
    chunks = list(resamples(["a", "b", "c", "d"], 12))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2]
    assert all((chunk.sum(axis=1) == 4).all() for chunk in chunks)


def test_rows_of_one_group_are_drawn_together() -> None:
    (weights,) = resamples(["a", "b", "a", "c"], 50)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert np.ptp(weights[:, 0]) > 0
