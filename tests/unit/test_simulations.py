"""What intervals, verdicts and sample sizes promise, held against rows that are drawn."""

from functools import cache
from math import comb
from statistics import NormalDist

import numpy as np
import pytest

from distill_datasets.statistics import (
    Floats,
    _score,
    effective_rows_of,
    least_margin,
    mean_difference,
    paired,
    power,
    rows_needed,
    wilson,
)

MARGIN = 0.02
Z = NormalDist().inv_cdf(0.95)


@cache
def share_interval(share: float, n: float) -> tuple[float, float]:
    return wilson(share, n)


def shares_of_groups(
    generator: np.random.Generator, share: float, likeness: float, shape: tuple[int, int]
) -> Floats:
    """Each group's own share, so that rows of a group are as alike as `likeness` says."""
    if likeness in (0, 1) or share in (0, 1):
        drawn = generator.random(shape) < share
        return np.where(likeness == 1, drawn, share)
    rest = (1 - likeness) / likeness
    return generator.beta(share * rest, (1 - share) * rest, shape)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("n", [50, 60, 78, 100, 150, 203, 300, 400, 500])
def test_intervals_of_single_rows_hold_the_truth_in_93_percent(n: int, share: float) -> None:
    """All outcomes with their chances, so that nothing is left to the draw."""
    held = 0.0
    for count in range(n + 1):
        low, high = wilson(count / n, n)
        if low <= share <= high:
            held += comb(n, count) * share**count * (1 - share) ** (n - count)
    assert held >= 0.93


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("likeness", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize(("n", "size"), [(50, 5), (100, 2), (300, 15), (500, 10)])
def test_intervals_of_groups_hold_the_truth_in_93_percent(
    n: int, size: int, likeness: float, share: float
) -> None:
    generator = np.random.default_rng(7)
    members = np.arange(n) // size
    own = shares_of_groups(generator, share, likeness, (3_000, n // size))
    rows = (generator.random((3_000, n)) < own[:, members]).astype(float)
    worth = effective_rows_of(rows, members)
    found = [
        share_interval(round(mean, 9), round(n, 6))
        for mean, n in zip(rows.mean(axis=1).tolist(), worth.tolist(), strict=True)
    ]
    held = np.mean([low <= share <= high for low, high in found])
    assert held >= 0.93


@pytest.mark.parametrize("n", [30, 120])
def test_intervals_of_skewed_scores_hold_the_truth_in_93_percent(n: int) -> None:
    generator = np.random.default_rng(3)
    groups = [str(row // 2) for row in range(n)]
    held = []
    for _ in range(150):
        common, own, second = (generator.beta(4, 1, size) for size in (n // 2, n, n))
        first = (common.repeat(2) + own) / 2
        found = mean_difference(first.tolist(), second.tolist(), groups)
        held.append(found["low"] <= 0.0 <= found["high"])
    assert np.mean(held) >= 0.93


def claims(up: Floats, down: Floats, n: Floats) -> Floats:
    """Which differences are shown to be above the margin, one-sided at 95 %.

    By the test that `paired` turns into an interval, of all at once; every 25th has its interval.
    """
    shown = _score(up * n, down * n, n, -MARGIN) > Z
    for one in range(0, len(n), 25):
        low, _ = paired(float(up[one]), float(down[one]), float(n[one]), 0.9)
        assert shown[one] == (low > -MARGIN)
    return shown


@pytest.mark.parametrize("discordance", [0.02, 0.024, 0.04, 0.1, 0.3])
def test_a_difference_of_the_margin_replaces_in_5_percent_at_most(discordance: float) -> None:
    """All outcomes of single rows, with their chances; what is tested is what sample sizes use."""
    for n in (50, 100, 133, 149, 158, 200, 240, 315, 500, 850, 1500, 3000):
        assert power(n, MARGIN, discordance, -MARGIN) <= 0.05


@pytest.mark.parametrize("discordance", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("likeness", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("n", "size"), [(300, 5), (500, 25), (1000, 10)])
def test_of_groups_too_the_margin_replaces_in_5_percent_at_most(
    n: int, size: int, likeness: float, discordance: float
) -> None:
    generator = np.random.default_rng(11)
    members = np.arange(n) // size
    shape = (1_500, n // size)
    lost = shares_of_groups(generator, (discordance + MARGIN) / 2, likeness, shape)[:, members]
    won = shares_of_groups(generator, (discordance - MARGIN) / 2, likeness, shape)[:, members]
    drawn = generator.random((1_500, n))
    rows = np.where(drawn < lost, -1.0, np.where(drawn > 1 - won, 1.0, 0.0))
    worth = effective_rows_of(rows, members)
    wrong = claims((rows > 0).mean(axis=1), (rows < 0).mean(axis=1), worth)
    assert wrong.mean() <= 0.05 + 1.645 * np.sqrt(0.05 * 0.95 / 1_500)


def test_scores_that_are_seldom_lost_replace_in_5_percent_at_most() -> None:
    """Where a row in ten loses a fifth, or one in fifty all, some hundred rows may show neither."""
    generator = np.random.default_rng(5)
    n, times = 120, 80
    groups = [str(row) for row in range(n)]
    for chance, lost in ((0.1, 0.2), (0.02, 1.0)):
        drawn = (generator.random((times, n)) < chance) * lost
        found = [mean_difference([0.0] * n, one, groups, 0.9)["low"] for one in drawn.tolist()]
        wrong = sum(low > -MARGIN for low in found)
        assert wrong <= 7  # 4 of 80 are expected at most, 7 in all but 5 %


@pytest.mark.parametrize("discordance", [0.005, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
def test_the_rows_that_are_asked_for_have_the_power_that_is_promised(
    margin: float, discordance: float
) -> None:
    n = rows_needed(margin, discordance)
    assert n is not None
    for more in (0, 1, 3, 10, n // 20):
        assert power(n + more, margin, discordance) >= 0.79
    assert power(n, margin, discordance) >= 0.8
    assert least_margin(n, discordance) <= margin


def test_the_power_is_that_of_drawn_rows() -> None:
    generator = np.random.default_rng(1)
    n, discordance = 850, 0.05
    half = discordance / 2
    counts = generator.multinomial(n, [half, half, 1 - discordance], 4_000)
    shown = claims(counts[:, 0] / n, counts[:, 1] / n, np.full(4_000, float(n)))
    assert shown.mean() == pytest.approx(power(n, MARGIN, discordance), abs=0.02)
    assert shown.mean() == pytest.approx(0.8, abs=0.025)


def test_the_power_at_the_difference_that_is_found_counts_too() -> None:
    worse, same = (rows_needed(MARGIN, 0.05, difference) for difference in (-0.01, 0.0))
    assert worse is not None and same is not None and worse > 3 * same
    assert rows_needed(MARGIN, 0.05, -0.02) is None
    # How many show that a difference of 5 % is more than 2 %.
    assert rows_needed(-MARGIN, 0.06, 0.05) == pytest.approx(430, rel=0.25)
