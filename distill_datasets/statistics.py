"""What a number measured on some rows says of all rows: intervals, tests and sample sizes.

Rows come in groups of related ones, such as translations of a text, which count together: where
the rows of a group are all alike, the groups are what is counted. Shares have score intervals,
paired differences of right and wrong too, every other number a bootstrap over groups. No interval
has zero width: where nothing varies, a bootstrap alone would claim certainty.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, hypot, lgamma, log, pi, sqrt, tan
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError

Floats = NDArray[np.float64]

FEW = 20  # rows of a subgroup of which nothing is said
POWER = 0.8  # how often enough rows decide, where there is nothing to find
LEVEL = 0.95

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_CELLS = 65_536  # weights at once: half a megabyte stays in a core's cache
_LEAST_FINITE = 0.975  # of the draws
# Poisson's lower bounds for 0 to 10 events: half of chi-squared's 5 % quantiles.
_RARE = (0.0, 0.0513, 0.3554, 0.8177, 1.3663, 1.9701, 2.6130, 3.2853, 3.9808, 4.6952, 5.4254)
_PRIOR = 2.0  # groups whose rows are all alike, taken for seen
# Rows by which a paired difference is taken for less: enough to keep a claim that is wrong at the
# margin under 5 % for 50 rows and more, where the plain score test has up to 7 %.
_CORRECTION = 0.25
_MOST_ROWS = 1_000_000
_MOST_EXACT = 50_000  # rows; of more, the normal distribution is near enough


@dataclass(frozen=True)
class Proportion:
    """The share of rows that are 1 and not 0, or the `difference` of two shares of the same rows.

    The rows of a difference are 1, 0 or -1. Intervals are by as many rows as the groups are worth.

    >>> round(Proportion([1, 1, 1, 0], ["a", "b", "c", "d"]).interval()["low"], 4)
    0.3006
    """

    rows: Sequence[float]
    groups: Sequence[str]
    difference: bool = False

    def __post_init__(self) -> None:
        """Raises `DatasetError` for no rows."""
        if not len(self.rows):
            raise DatasetError("There are no rows to compute a share of.")

    @property
    def value(self) -> float:
        """The mean."""
        return float(np.mean(self.rows))

    def interval(self, level: float = LEVEL) -> dict[str, float]:
        """`value`, `low`, `high`, and `n`: how many independent rows they stand on."""
        n = effective_rows(self.rows, self.groups)
        if self.difference:
            rows = np.asarray(self.rows)
            low, high = paired(float((rows > 0).mean()), float((rows < 0).mean()), n, level)
        else:
            low, high = wilson(self.value, n, level)
        return {"value": self.value, "low": low, "high": high, "n": n}

    def __sub__(self, other: "Estimate") -> "Proportion":
        """Row by row."""
        assert isinstance(other, Proportion)
        return Proportion(np.subtract(self.rows, other.rows).tolist(), self.groups, True)


@dataclass(frozen=True)
class Bootstrap:
    """A value with its draws, one a resample of the groups.

    Estimates over the same groups share their resamples, so that the difference of two is the
    paired bootstrap. `n` is how many independent rows a value from 0 to 1 stands on: where those
    are few, the interval is wider than the draws, and where all draws are alike it is that of a
    share; a `difference` lies between -1 and 1.
    """

    value: float
    draws: Floats
    n: float | None = None
    difference: bool = False

    def __sub__(self, other: "Estimate") -> "Bootstrap":
        """Resample by resample."""
        assert isinstance(other, Bootstrap)
        n = None if self.n is None or other.n is None else min(self.n, other.n)
        return Bootstrap(self.value - other.value, self.draws - other.draws, n, difference=True)

    def interval(self, level: float = LEVEL) -> dict[str, float]:
        """The percentile interval; without varying draws that of a share of `n` rows, if known."""
        finite = self.draws[np.isfinite(self.draws)]
        if len(finite) < max(1, _LEAST_FINITE * len(self.draws)):
            return {"value": self.value}
        tail = _tail(level, self.n)
        low, high = (float(end) for end in np.quantile(finite, [tail, 1 - tail]))
        if not high > low:
            if self.n is None:
                return {"value": self.value}
            if self.difference:
                up, down = max(self.value, 0.0), max(-self.value, 0.0)
                low, high = paired(up, down, self.n, level)
            else:
                low, high = wilson(min(max(self.value, 0.0), 1.0), self.n, level)
        count = {} if self.n is None else {"n": self.n}
        return {"value": self.value, "low": low, "high": high, **count}


Estimate = Proportion | Bootstrap


def wilson(share: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share among `n` independent rows.

    Where ten rows at most differ from all others, the end next to 0 or 1 is Poisson's, as
    Brown, Cai and DasGupta (2001) amend it: without, 95 % are 92 % for shares as near as 0.98.

    >>> [round(end, 4) for end in wilson(1.0, 315)]
    [0.988, 1.0]
    """
    z = _NORMAL.inv_cdf((1 + level) / 2)
    middle = share + z**2 / (2 * n)
    margin = z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + side) / (1 + z**2 / n) for side in (-margin, margin))
    rare = min(share, 1 - share) * n
    if rare < len(_RARE) - 1 + 1e-6:
        end = float(np.interp(rare, range(len(_RARE)), _RARE)) / n
        low, high = (min(low, end), high) if share < 0.5 else (low, max(high, 1 - end))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def paired(
    up: float, down: float, n: float, level: float = LEVEL, correction: float = _CORRECTION
) -> tuple[float, float]:
    """The interval of `up` - `down`: the shares of `n` rows where one of two is right alone.

    Tango's score interval (1998), which holds where nearly all pairs are equal, each end by a
    quarter of a row further out.

    >>> [round(end, 4) for end in paired(6 / 161, 16 / 161, 161, correction=0)]
    [-0.124, -0.0054]
    """
    z = _NORMAL.inv_cdf((1 + level) / 2)
    low = _paired_low(up * n, down * n, n, z, correction)
    high = -_paired_low(down * n, up * n, n, z, correction)
    return max(-1.0, min(low, up - down)), min(1.0, max(high, up - down))


def _paired_low(up: float, down: float, n: float, z: float, correction: float) -> float:
    return boundary(-1.0, (up - down) / n, lambda at: bool(_score(up, down, n, at, correction) > z))


def boundary(inside: float, outside: float, holds: Callable[[float], bool]) -> float:
    """Where what holds `inside`, and not `outside`, ends between them."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def _score(up: Any, down: Any, n: float, at: float, correction: float = _CORRECTION) -> Any:
    """How many standard errors a difference of counts lies above that of a difference `at`.

    The standard error is that of the likeliest shares whose difference is `at` (Tango, 1998).
    """
    # Of the shares that differ by `at`, the one of `down` solves 2n q**2 + b q + c = 0; abs()
    # keeps rounding from the roots of numbers below 0.
    b = (2 * n - up + down) * at - up - down
    c = -down * at * (1 - at)
    share = (abs(b * b - 8 * n * c) ** 0.5 - b) / (4 * n)
    return (up - down - correction - n * at) / (abs(n * (2 * share + at * (1 - at))) ** 0.5 + 1e-12)


def mean_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str], level: float = LEVEL
) -> dict[str, float]:
    """The mean of `first` - `second`, scores from 0 to 1 of the same rows, by a cluster bootstrap.

    What no row has shown yet may still be there: each end is further out, by the end that a paired
    difference has where nothing differs, as two independent errors add.
    """
    apart = np.subtract(first, second).astype(float)
    n = effective_rows(apart.tolist(), groups)
    value = float(apart.mean())
    members = _members(groups)
    sums, sizes = np.bincount(members, apart), np.bincount(members)
    chunks = [
        sums.take(drawn).sum(axis=1) / sizes.take(drawn).sum(axis=1)
        for drawn in _drawn_groups(members, 4_000)
    ]
    tail = _tail(level, float(len(set(groups))))
    low, high = (float(end) for end in np.quantile(np.concatenate(chunks), [tail, 1 - tail]))
    unseen = paired(0.0, 0.0, n, level)[1]
    low, high = value - hypot(value - low, unseen), value + hypot(high - value, unseen)
    return {"value": value, "low": max(-1.0, low), "high": min(1.0, high), "n": n}


def independent_difference(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, float]:
    """The difference of two numbers of different rows, by the interval that each has of its own.

    The method of variance estimates recovery, which for shares is Newcombe's (1998). Without both
    intervals there is none of the difference.
    """
    value = first["value"] - second["value"]
    if not {"low", "high"} <= first.keys() & second.keys():
        return {"value": value}
    low = hypot(first["value"] - first["low"], second["high"] - second["value"])
    high = hypot(first["high"] - first["value"], second["value"] - second["low"])
    return {"value": value, "low": value - low, "high": value + high}


def ratio_of_intervals(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    """The ratio of two numbers above 0, each with its own interval, as their logarithms differ.

    Without both intervals, or where one reaches 0, there is none of the ratio.
    """
    logs = []
    for one in (above, below):
        known = {end: one[end] for end in ("value", "low", "high") if end in one}
        if not all(number > 0 for number in known.values()):
            known = {"value": one["value"]}
        logs.append({end: log(number) for end, number in known.items()})
    return {end: exp(number) for end, number in independent_difference(*logs).items()}


def median_interval(values: Sequence[float], level: float = LEVEL) -> dict[str, float]:
    """The median, and between which two of the values it lies, whatever they are spread like.

    Six values are the fewest that say so at 95 %; of fewer, or where they are alike, there is no
    interval.

    >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    {'value': 3.5, 'low': 1.0, 'high': 6.0}
    """
    known, n = sorted(values), len(values)
    found = {"value": float(np.median(known))}
    chance, place = 0.0, 0  # that fewer than `place` values lie below the median
    while True:
        chance += _evenly(place, n)
        if chance > (1 - level) / 2:
            break
        place += 1
    if not place or not known[place - 1] < known[n - place]:
        return found
    return {**found, "low": known[place - 1], "high": known[n - place]}


def _evenly(count: int, n: int) -> float:
    """How likely so many of `n` coins show heads."""
    return exp(lgamma(n + 1) - lgamma(count + 1) - lgamma(n - count + 1) - n * log(2))


def mcnemar(differences: Sequence[float], groups: Sequence[str] | None = None) -> float:
    """The exact mid-p value of McNemar's test, of rows that are 1, 0 or -1: who is right alone.

    Where there are `groups`, each counts once, by the sign of its sum.

    >>> round(mcnemar([1.0] * 6 + [-1.0] * 16), 6)
    0.03469
    """
    signs = np.sign(np.asarray(differences, np.float64))
    if groups is not None:
        signs = np.sign(np.bincount(_members(groups), signs))
    up, down = int((signs > 0).sum()), int((signs < 0).sum())
    n, fewer = up + down, min(up, down)
    if not n:
        return 1.0
    chances = [_evenly(one, n) for one in range(fewer + 1)]
    return min(1.0, 2 * sum(chances) - chances[-1])


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The p-values, each adjusted for all: those up to 0.05 are wrong in 5 % of cases at most.

    >>> benjamini_hochberg([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    found: list[float] = adjusted.tolist()
    return found


def compare_subgroups(
    differences: Sequence[float], subgroups: Sequence[str], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """A paired difference in each subgroup of rows that are 1, 0 or -1, such as a label's.

    By subgroup: `rows`, `difference`, `p`, `p_adjusted` for all subgroups by Benjamini and
    Hochberg, and `significant`; of fewer than 20 rows `note` says that they are too few.
    """
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(subgroups):
        rows_of.setdefault(name, []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for name, rows in sorted(rows_of.items()):
        found[name] = {"rows": len(rows)}
        if len(rows) < FEW:
            found[name]["note"] = "too few"
            continue
        own, related = [differences[row] for row in rows], [groups[row] for row in rows]
        found[name]["difference"] = Proportion(own, related, difference=True).interval()
        found[name]["p"] = mcnemar(own, related)
    told = [one for one in found.values() if "p" in one]
    for one, p in zip(told, benjamini_hochberg([one["p"] for one in told]), strict=True):
        one |= {"p_adjusted": p, "significant": p <= 1 - LEVEL}
    return found


def power(n: int, margin: float, discordance: float, difference: float = 0.0) -> float:
    """How often `n` rows show that a difference is above -`margin`, at 95 % and one-sided.

    On a share of `discordance` of the rows one of two is right alone; `difference` is the true
    one. Computed from all outcomes that may come, so that it holds for few rows too.

    >>> round(power(850, 0.02, 0.05), 2)
    0.8
    """
    shares = [(discordance + difference) / 2, (discordance - difference) / 2]
    spans = []
    for share in shares:
        mean, spread = n * share, 7 * sqrt(n * share * (1 - share)) + 7
        spans.append(np.arange(max(0, int(mean - spread)), min(n, int(mean + spread)) + 1.0))
    up, down = spans[0][:, None], spans[1][None, :]
    same = n - up - down
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n + 1)))])
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = factorials[n] - factorials[np.maximum(same, 0).astype(int)]
        parts = [(up, shares[0]), (down, shares[1]), (same, 1 - discordance)]
        for count, share in parts:
            chance = chance + np.where(count > 0, count * np.log(share), 0.0)
    for count in (up, down):
        chance = chance - factorials[count.astype(int)]
    shown = _score(up, down, n, -margin) > _NORMAL.inv_cdf(LEVEL)
    return float(np.exp(chance[shown & (same >= 0)]).sum())


def rows_needed(margin: float, discordance: float, difference: float = 0.0) -> int | None:
    """How many independent rows show a difference above -`margin` with a power of 0.8.

    None where a million don't. A negative margin asks that the difference is above what it is.

    >>> rows_needed(0.02, 0.05) > 750
    True
    """
    distance = margin + difference
    if distance <= 0:
        return None
    spread = discordance - difference**2
    z = _NORMAL.inv_cdf(LEVEL)
    deviates = z + _NORMAL.inv_cdf(POWER)
    # So many show it at the least: where no row differs.
    least = _first(lambda n: bool(_score(0.0, 0.0, n, -abs(margin)) > z), _MOST_ROWS)
    about = max(float(least), deviates**2 * spread / distance**2)
    if about > _MOST_ROWS:
        return None
    if about > _MOST_EXACT:
        return round(about)
    # Counts are whole, so that the power of few goes up and down: after the last that lacks it.
    few = about * discordance < 100
    tried = [round(about * 0.85 * 1.02**step) for step in range(110 if few else 30)]
    enough = 0
    for n in dict.fromkeys(max(least, one) for one in tried):
        if power(n, margin, discordance, difference) < POWER:
            enough = 0
        elif not enough:
            enough = n
        if enough and (not few or n > 1.25 * enough):
            break
    return enough or None


def rows_needed_of_scores(margin: float, spread: float, difference: float = 0.0) -> int | None:
    """`rows_needed` for scores, by the standard deviation of their difference."""
    distance = margin + difference

    def enough(n: int) -> bool:
        error = spread / sqrt(n)
        unseen = paired(0.0, 0.0, n, 2 * LEVEL - 1)[1]
        end = sqrt((_NORMAL.inv_cdf(LEVEL) * error) ** 2 + unseen**2)
        return end + _NORMAL.inv_cdf(POWER) * error <= distance

    return _first(enough, _MOST_ROWS) if enough(_MOST_ROWS) else None


def least_margin(n: int, discordance: float) -> float:
    """The least margin, in whole thousandths, that `n` rows show with a power of 0.8."""
    return _first(lambda part: power(n, part / 1000, discordance) >= POWER, 1000) / 1000


def _first(holds: Callable[[int], bool], most: int) -> int:
    """The first number from 1 that something holds for, and for all after it."""
    return bisect_left(range(1, most), True, key=holds) + 1


def effective_rows(values: Sequence[float], groups: Sequence[str]) -> float:
    """How many independent rows are worth as much as these in their groups.

    Where all rows of each group agree it is the number of groups, less where some are larger; with
    every group that shows its rows to be no more alike than any others, it nears the number of
    rows. What two groups whose rows are all alike would show is taken for granted.

        >>> effective_rows([1, 1, 0, 0, 1, 1], ["a", "a", "b", "b", "c", "c"])
        3.0
    """
    return float(effective_rows_of(np.asarray([values], np.float64), _members(groups))[0])


def effective_rows_of(samples: Floats, members: NDArray[np.int64]) -> Floats:
    """`effective_rows` of many samples at once, a line each; `members` numbers the groups."""
    sizes = np.bincount(members).astype(np.float64)
    deviations = (samples - samples.mean(axis=1, keepdims=True)) ** 2
    of_group = _sums(deviations, members)
    # How many groups the deviations are spread over.
    spread = of_group.sum(axis=1) ** 2 / np.maximum((of_group**2).sum(axis=1), 1e-300)
    spread = np.maximum(spread, 1.0)
    found = _likeness(samples, members)
    likeness = (spread * found + _PRIOR) / (spread + _PRIOR)
    size = (sizes**2).sum() / sizes.sum()
    n = samples.shape[1]
    # The variance of few groups is a guess: Student's quantiles are so much above the normal's.
    wider = (1 + (_Z**2 + 1) / (4 * spread)) ** 2
    worth = np.maximum(n / (1 + (size - 1) * likeness) / wider, n / size)
    known: Floats = np.where(found < 1, worth, n / size)
    return known


def _likeness(samples: Floats, members: NDArray[np.int64]) -> Floats:
    """How alike the values of a group are, in each sample, by one-way analysis of variance.

    From 0 to 1, which it is where no group varies within, and for a single group.
    """
    sizes = np.bincount(members)
    n, k = samples.shape[1], len(sizes)
    if k in (1, n):
        return np.ones(len(samples))
    means = _sums(samples, members) / sizes
    within = ((samples - means[:, members]) ** 2).sum(axis=1)
    between = (sizes * (means - samples.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) / (k - 1)
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    inside = within / (n - k)
    likeness = (between - inside) / np.maximum(between + (size - 1) * inside, 1e-300)
    found: Floats = np.where(within < 1e-12, 1.0, np.clip(likeness, 0.0, 1.0))
    return found


def _members(groups: Sequence[str]) -> NDArray[np.int64]:
    """The number of each row's group."""
    _, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return members.astype(np.int64)


def _sums(samples: Floats, members: NDArray[np.int64]) -> Floats:
    """The sum of each group, in every sample."""
    order = np.argsort(members, kind="stable")
    starts = np.searchsorted(members[order], np.arange(members.max() + 1))
    sums: Floats = np.add.reduceat(samples[:, order], starts, axis=1)
    return sums


def resamples(groups: Sequence[str], count: int, seed: int = 0) -> Iterator[Floats]:
    """Weights of the rows in `count` resamples of whole groups, a chunk of resamples at a time."""
    members = _members(groups)
    size = int(members.max()) + 1
    for drawn in _drawn_groups(members, count, seed):
        places = drawn + size * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        yield times.astype(np.float64).take(members, axis=1)


def _drawn_groups(
    members: NDArray[np.int64], count: int, seed: int = 0
) -> Iterator[NDArray[np.int64]]:
    """The groups of `count` resamples, as many in each as there are, a line for a resample."""
    size, chunk = int(members.max()) + 1, max(1, _CELLS // len(members))
    generator = np.random.default_rng(seed)
    for start in range(0, count, chunk):
        yield generator.integers(size, size=(min(chunk, count - start), size))


def _tail(level: float, n: float | None) -> float:
    """The share of a bootstrap's draws outside either end of an interval.

    Draws vary less than they should where rows are few, and their percentiles are wider apart in
    turn, as Hesterberg (2015) expands them: by Student's quantiles, and by the variance's n - 1.
    """
    tail = (1 - level) / 2
    if n is None:
        return tail
    freedom = max(n - 1, 1.0)
    return _NORMAL.cdf(-sqrt(max(n, 2.0) / freedom) * student(1 - tail, freedom))


def confidence_sequence(total: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a mean of `n` numbers from 0 to 1 that holds however often one looks.

    Other intervals are for a number of rows that was chosen before; whoever looks after each row
    and stops when one excludes a value is wrong far more often than they say. This one is all
    means that `excludes` does not name. `total` is the sum of the numbers.

    >>> [round(end, 3) for end in confidence_sequence(95, 100)]
    [0.844, 0.993]
    """

    def possible(mean: float) -> bool:
        return not excludes(total, n, mean, level)

    if n <= 0:
        return 0.0, 1.0
    low, high = (boundary(total / n, end, possible) for end in (0.0, 1.0))
    return (low if total > 0 else 0.0), (high if total < n else 1.0)


def excludes(total: float, n: int, mean: float, level: float = LEVEL) -> bool:
    """Whether numbers from 0 to 1 rule out their mean, at every time that one asks together.

    They do where Beta(1/2, 1/2)'s mixture of likelihood ratios, which is a supermartingale, has
    reached 1 / (1 - level) (Ville's inequality; Robbins, 1970).
    """
    won, lost = max(total, 0.0), max(n - total, 0.0)
    if (mean <= 0 and won) or (mean >= 1 and lost):
        return True
    mixture = lgamma(won + 0.5) + lgamma(lost + 0.5) - lgamma(n + 1) - log(pi)
    likelihood = (won * log(mean) if won else 0.0) + (lost * log(1 - mean) if lost else 0.0)
    return mixture - likelihood >= -log(1 - level)


def rows_to_tell(mean: float, limit: float, level: float = LEVEL) -> int | None:
    """After about how many numbers of this mean they exclude the limit; None after a million."""

    def told(n: int) -> bool:
        return excludes(mean * n, n, limit, level)

    return _first(told, _MOST_ROWS) if mean != limit and told(_MOST_ROWS) else None


def student(share: float, freedom: float) -> float:
    """The quantile of Student's distribution, good to a hundredth from two degrees of `freedom`."""
    if freedom < 2:
        return tan(pi * (share - 0.5))
    z = _NORMAL.inv_cdf(share)
    if freedom == 2:
        return (2 * share - 1) * sqrt(2 / (4 * share * (1 - share)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**place for place, term in enumerate(terms, 1))
