"""Which answers may be given alone: thresholds of confidence that hold what they promise."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma, log

import numpy as np

from distill_datasets.statistics import LEVEL

_ROUNDED = 1e-6  # of a sum of parts of groups


def binomial_tail(k: float, n: float, share: float) -> float:
    """How likely at most `k` of `n` rows are, each with a chance of `share`; both may be parts of
    rows, as of effective ones.

    >>> round(binomial_tail(0, 299, 0.01), 4)
    0.0495
    """
    if k >= n or share <= 0:
        return 1.0
    return 0.0 if share >= 1 else _incomplete_beta(n - k, k + 1, 1 - share)


def share_at_most(k: float, n: float, level: float = LEVEL) -> float:
    """Clopper and Pearson's upper bound, one-sided, of a share of which `n` rows show `k`.

    >>> round(share_at_most(0, 299), 4)
    0.01
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(k, n, middle) > 1 - level else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised one, by Lentz's continued fraction."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    least = 1e-300
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x)) / a
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), least)
    found = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            d = 1 / (1 + part * d or least)
            c = 1 + part / c or least
            found *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return front * found


@dataclass(frozen=True)
class Certified:
    """A threshold: of what scores above it, at most the share asked for is wrong.

    `rows` of the calibration score above it, `wrong` of them are; `bound` is the most that the
    share of those can be, at the level that was asked for.
    """

    threshold: float
    rows: int
    wrong: int
    bound: float


def certify(
    scores: Sequence[float],
    wrong: Sequence[bool],
    groups: Sequence[str],
    most: float,
    level: float = LEVEL,
) -> Certified | None:
    """The lowest threshold above which at most a share of `most` is wrong; None where none is.

    It holds with a probability of `level` over the groups that it was chosen by. Those are a sample
    of all groups, so that a binomial test says whether too many of what scores above a score are
    wrong. Tests go on to lower scores until the first that can't tell, from up to three places that
    only the scores decide, each at its part of what may fail; so the choice among all of them costs
    nothing more (Angelopoulos et al., "Learn then test", 2021). The rows of a group count as one
    together, however much they differ: how alike those are that are served, and all of them right,
    nothing tells.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    falling, errors = -np.asarray(scores, np.float64)[order], np.asarray(wrong)[order]
    sizes = Counter(groups)
    parts = np.array([1 / sizes[group] for group in groups])[order]
    served = np.concatenate([[0], np.cumsum(parts)])
    failed = np.concatenate([[0], np.cumsum(parts * errors)])
    starts, level = _starts(len(sizes), most, level)
    n, best = len(order), 0
    for start in starts:
        first = int(np.searchsorted(served, start - _ROUNDED))
        ranks = np.arange(first, n, max(1, (n - first) // 50))
        # Rows that tie with the next one are not above it.
        tested = {*np.searchsorted(falling, falling[ranks]).tolist(), n}
        for rows in sorted(size for size in tested if size >= first):
            if binomial_tail(failed[rows], served[rows], most) > 1 - level:
                break
            best = max(best, rows)
    if not best:
        return None
    threshold = -float("inf") if best == n else float(-falling[best])
    bound = share_at_most(failed[best], served[best], level)
    return Certified(threshold, best, int(errors[:best].sum()), bound)


def rows_to_certify(most: float, level: float = LEVEL) -> int:
    """How many groups, none of their rows wrong, `certify` needs at the least.

    >>> rows_to_certify(0.01)
    299
    """
    return ceil(log(1 - level) / log(1 - most))


@lru_cache(maxsize=256)
def _starts(n: int, most: float, level: float) -> tuple[list[int], float]:
    """How many groups are tested first, so that 0, 2 or 5 wrong ones may pass, and the level of
    each test; as many as `n` groups allow.
    """
    for allowed in ((0, 2, 5), (0, 2), (0,)):
        each = 1 - (1 - level) / len(allowed)

        def passes(size: int, k: int, each: float = each) -> bool:
            return binomial_tail(k, size, most) <= 1 - each

        if n and passes(n, allowed[-1]):
            return [
                bisect_left(range(n + 1), True, key=lambda m: passes(m, k)) for k in allowed
            ], each
    return [], level
