"""Intervals against numbers computed elsewhere.

SciPy and statsmodels, which take a second to import, are imported where they are asked.
"""

import json
import math

import numpy as np
import pytest

from distill_datasets import statistics
from distill_datasets.statistics import (
    Bootstrap,
    Proportion,
    benjamini_hochberg,
    compare_subgroups,
    effective_rows,
    independent_difference,
    mcnemar,
    mean_difference,
    median_interval,
    paired,
    ratio_of_intervals,
    resamples,
    rows_needed,
    student,
    wilson,
)


def alone(count: int) -> list[str]:
    """Groups of one row each."""
    return [str(row) for row in range(count)]


@pytest.mark.parametrize(
    ("count", "n"), [(315, 315), (300, 315), (300, 400), (0, 8), (0, 1), (22, 44), (1000, 1000)]
)
def test_the_interval_of_a_share_is_wilsons(count: int, n: int) -> None:
    from scipy.stats import binomtest
    from statsmodels.stats.proportion import proportion_confint

    found = Proportion([1.0] * count + [0.0] * (n - count), alone(n)).interval()
    ends = (found["low"], found["high"])
    assert ends == pytest.approx(proportion_confint(count, n, method="wilson"), abs=1e-12)
    theirs = binomtest(count, n).proportion_ci(method="wilson")
    assert ends == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (found["value"], found["n"]) == (count / n, n)


@pytest.mark.parametrize("rare", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("n", [50, 315])
def test_the_end_next_to_one_is_poissons_where_up_to_ten_rows_differ(rare: int, n: int) -> None:
    from scipy.stats import binomtest, chi2

    theirs = chi2.ppf(0.05, 2 * rare) / 2 / n
    low, high = wilson(1 - rare / n, n)
    wilsons = binomtest(n - rare, n).proportion_ci(method="wilson")
    assert 1 - high == pytest.approx(min(theirs, 1 - wilsons.high), abs=1e-4 / n)
    assert low == pytest.approx(wilsons.low)
    assert wilson(rare / n, n) == pytest.approx((1 - high, 1 - low))


# `contingencytables::Tango_asymptotic_score_CI_paired_2x2` on the tables of Bentur (2009) and Cavo
# (2012), by the tests of that package and Fagerland, Lydersen and Laake (2014), table V.
@pytest.mark.parametrize(
    ("up", "down", "n", "low", "high"),
    [(6, 16, 161, -0.1240, -0.0054), (1, 7, 21, -0.517, -0.026)],
)
def test_the_interval_of_a_paired_difference_is_tangos(
    up: int, down: int, n: int, low: float, high: float
) -> None:
    places = 3 if n == 21 else 4
    found = paired(up / n, down / n, n, correction=0)
    assert [round(end, places) for end in found] == [low, high]
    first = [1.0] * up + [0.0] * (n - up)
    second = [0.0] * up + [1.0] * down + [0.0] * (n - up - down)
    ours = (Proportion(first, alone(n)) - Proportion(second, alone(n))).interval()
    assert (ours["low"], ours["high"]) == paired(up / n, down / n, n)
    assert ours["value"] == pytest.approx((up - down) / n)
    assert ours["low"] < found[0] < found[1] < ours["high"]


@pytest.mark.parametrize(("up", "down", "n"), [(26, 4, 48), (0, 1, 150), (3, 9, 700), (2, 0, 60)])
def test_the_ends_of_a_paired_difference_are_those_of_the_likelihood(
    up: int, down: int, n: int
) -> None:
    """At either end the score test of the likeliest shares, found by scipy, is just significant."""

    from scipy.optimize import minimize_scalar
    from scipy.special import xlogy
    from scipy.stats import norm

    def deviates(at: float) -> float:
        def unlikely(share: float) -> float:
            shares = (share + at, share, 1 - 2 * share - at)
            return -sum(
                xlogy(count, max(part, 0.0))
                for count, part in zip((up, down, n - up - down), shares, strict=True)
            )

        least, most = max(0.0, -at), (1 - at) / 2
        share = minimize_scalar(
            unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-12}
        ).x
        return float((up - down - n * at) / np.sqrt(n * (2 * share + at - at**2)))

    low, high = paired(up / n, down / n, n, correction=0)
    assert deviates(low) == pytest.approx(norm.ppf(0.975), abs=1e-3)
    assert deviates(high) == pytest.approx(norm.ppf(0.025), abs=1e-3)


@pytest.mark.parametrize(("up", "down"), [(6, 16), (0, 5), (3, 3), (0, 0), (400, 430), (1, 0)])
def test_mcnemars_mid_p_is_that_of_the_binomial(up: int, down: int) -> None:
    from scipy.stats import binom
    from statsmodels.stats import contingency_tables

    rows = [1.0] * up + [-1.0] * down + [0.0] * 50
    n, fewer = up + down, min(up, down)
    theirs = min(1.0, 2 * binom.cdf(fewer, n, 0.5) - binom.pmf(fewer, n, 0.5))
    assert mcnemar(rows) == pytest.approx(theirs if n else 1.0)
    # The exact test, which is not mid-p, counts the outcome found as a whole.
    if up != down:
        table = [[0, up], [down, 50]]
        exact = contingency_tables.mcnemar(table, exact=True).pvalue
        assert mcnemar(rows) == pytest.approx(exact - binom.pmf(fewer, n, 0.5))


def test_mcnemars_groups_count_once_each() -> None:
    rows = [1.0, 1.0, 1.0, -1.0, 0.0, 1.0, -1.0]
    assert mcnemar(rows, ["a", "a", "a", "b", "b", "c", "c"]) == mcnemar([1.0, -1.0, 0.0])
    assert mcnemar(rows, alone(7)) == mcnemar(rows)


@pytest.mark.parametrize("seed", range(5))
def test_benjamini_and_hochbergs_values_are_scipys_and_statsmodels(seed: int) -> None:
    from scipy.stats import false_discovery_control
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(seed).random(12) ** 3
    assert benjamini_hochberg(p.tolist()) == pytest.approx(false_discovery_control(p))
    assert benjamini_hochberg(p.tolist()) == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert benjamini_hochberg([]) == []


def test_subgroups_of_under_20_rows_are_too_few() -> None:
    rows = [1.0] * 30 + [0.0] * 10 + [-1.0] * 19 + [0.0] * 40
    names = ["better"] * 40 + ["small"] * 19 + ["same"] * 40
    found = compare_subgroups(rows, names, alone(99))
    assert found["small"] == {"rows": 19, "note": "too few"}
    assert found["better"]["significant"] and not found["same"]["significant"]
    assert found["better"]["p_adjusted"] == pytest.approx(2 * found["better"]["p"])
    assert found["same"]["difference"]["low"] < 0 < found["same"]["difference"]["high"]
    assert "p_adjusted" not in found["small"]


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 30, 500])
@pytest.mark.parametrize("share", [0.9, 0.95, 0.975])
def test_students_quantiles_are_scipys(freedom: int, share: float) -> None:
    from scipy.stats import t

    assert student(share, freedom) == pytest.approx(t.ppf(share, freedom), rel=0.01)


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
    likeness = statistics._likeness(np.asarray([values]), statistics._members(groups))
    assert likeness[0] == pytest.approx(0.1657, abs=1e-4)


@pytest.mark.parametrize("counts", [(40, 60, 20, 50), (30, 45, 200, 300), (12, 100, 15, 40)])
def test_the_difference_of_shares_of_different_rows_is_newcombes(counts: tuple[int, ...]) -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    shares = [
        Proportion([1.0] * count + [0.0] * (n - count), alone(n)).interval()
        for count, n in (counts[:2], counts[2:])
    ]
    found = independent_difference(*shares)
    theirs = confint_proportions_2indep(*counts, method="newcomb", compare="diff")
    assert (found["low"], found["high"]) == pytest.approx(theirs)


@pytest.mark.parametrize("n", [6, 9, 20, 57])
def test_the_interval_of_a_median_is_the_one_of_scipys_binomial(n: int) -> None:
    from scipy.stats import binom

    values = [float(one) for one in range(n)]
    place = int(binom.ppf(0.025, n, 0.5))
    found = median_interval(values)
    assert (found["low"], found["high"]) == (values[place - 1], values[n - place])
    assert 1 - 2 * binom.cdf(place - 1, n, 0.5) >= 0.95


def test_too_few_or_equal_values_have_a_median_alone() -> None:
    assert median_interval([1.0, 2.0, 4.0]) == {"value": 2.0}
    assert median_interval([2.0] * 30) == {"value": 2.0}


def test_the_interval_of_a_ratio_is_that_of_the_logarithms() -> None:
    above = {"value": 4.0, "low": 2.0, "high": 8.0}
    found = ratio_of_intervals(above, {"value": 2.0, "low": 1.0, "high": 4.0})
    far = math.exp(math.hypot(math.log(2), math.log(2)))
    assert found == pytest.approx({"value": 2.0, "low": 2 / far, "high": 2 * far})
    assert ratio_of_intervals(above, {"value": 2.0}) == pytest.approx({"value": 2.0})
    assert ratio_of_intervals({**above, "low": 0.0}, above) == pytest.approx({"value": 1.0})


@pytest.mark.parametrize("size", [1, 2, 15])
@pytest.mark.parametrize("right", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)])
def test_groups_whose_rows_all_agree_count_once(size: int, right: tuple[int, ...]) -> None:
    groups = [str(group) for group in range(4) for _ in range(size)]
    values = [float(right[int(group)]) for group in groups]
    assert effective_rows(values, groups) == pytest.approx(4)
    found = Proportion(values, groups).interval()
    assert (found["low"], found["high"]) == pytest.approx(wilson(sum(right) / 4, 4))
    assert found["n"] == 4


def test_a_group_of_more_rows_weighs_more_and_leaves_fewer_to_count() -> None:
    """The variance of a weighted mean: (sum of weights)**2 / sum of squares, as Kish has it."""
    values, groups = [1.0] * 9 + [0.0, 1.0, 1.0], ["a"] * 9 + ["b", "c", "d"]
    assert effective_rows(values, groups) == pytest.approx(12**2 / (9**2 + 3))


def test_groups_whose_rows_are_as_unlike_as_any_count_nearly_by_the_row() -> None:
    groups = [str(row // 2) for row in range(400)]
    assert 385 < effective_rows([1.0, 0.0] * 200, groups) < 400
    assert effective_rows([1.0, 0.0] * 20, alone(40)) == 40
    # One row of a kind says little of how alike those of its group are.
    assert 100 <= effective_rows([1.0] + [0.0] * 199, groups[:200]) < 120


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


def test_the_percentiles_of_a_bootstrap_of_few_groups_are_further_apart() -> None:
    from scipy.stats import norm, t

    draws = np.linspace(0, 1, 10_001)
    ends = [Bootstrap(0.5, draws, n).interval()["low"] for n in (None, 10_000.0, 20.0, 5.0)]
    assert ends[0] == pytest.approx(0.025)
    assert ends[0] > ends[1] > ends[2] > ends[3] >= 0
    # Hesterberg (2015), "What teachers should know about the bootstrap", for n = 5 and 20.
    tails = [norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1)) for n in (20, 5)]
    assert ends[2:] == pytest.approx(tails, abs=2e-4)


def test_a_difference_of_scores_is_never_without_width() -> None:
    from scipy.stats import norm

    same = mean_difference([0.5] * 40, [0.5] * 40, alone(40))
    assert (same["value"], same["n"]) == (0.0, 40)
    assert (same["low"], same["high"]) == pytest.approx(paired(0, 0, 40))
    generator = np.random.default_rng(0)
    first, second = generator.random(200), generator.random(200)
    found = mean_difference(first.tolist(), second.tolist(), alone(200))
    spread = norm.ppf(0.975) * np.std(first - second, ddof=1) / np.sqrt(200)
    assert found["high"] - found["value"] == pytest.approx(
        np.hypot(spread, paired(0, 0, 200)[1]), rel=0.1
    )


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


def test_many_rows_are_as_many_as_statsmodels_wants() -> None:
    """There, one sample's mean of a standard deviation of 1: an effect of margin / spread."""
    from statsmodels.stats.power import NormalIndPower

    for margin, discordance in ((0.02, 0.3), (0.01, 0.1)):
        effect = margin / np.sqrt(discordance)
        theirs = NormalIndPower(ddof=0).solve_power(
            effect, power=0.8, alpha=0.05, ratio=0, alternative="larger"
        )
        assert rows_needed(margin, discordance) == pytest.approx(theirs, rel=0.025)
