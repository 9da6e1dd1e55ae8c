"""Which answers may be given alone: thresholds of confidence that hold what they promise."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma, log, log1p
from typing import NamedTuple

import numpy as np

from distill_datasets.statistics import LEVEL

_ROUNDED = 1e-6  # of a sum of parts of groups
_LEAST = -1e3  # a log-probability


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


class Place(NamedTuple):
    """A token of an answer, its log-probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    likeliest: Sequence[tuple[str, float]] = ()


def choice_logprob(places: Iterable[Place], choices: Collection[str]) -> float:
    """The log-probability of an answer among the `choices`, in whatever tokens they are spelled.

    It is that of sampling which is held to them: at each place tokens are possible with which a
    choice goes on, and behind a whole choice everything else ends it. What is less likely than the
    `likeliest` is left out, and other tokens that leave open which choice it will be count against
    it. An answer that is none of the choices gets the least that there is.

    >>> rivals = [("yes", log(0.6)), ("no", log(0.2)), ("so", log(0.1))]
    >>> round(exp(choice_logprob([Place("yes", log(0.6), rivals)], ["yes", "no"])), 3)
    0.75
    """
    begun, said, walked = "", None, list[tuple[str, Place]]()
    for place in places:
        possible = _possible(begun, place.token, choices)
        walked.append((begun, place))
        if not possible or begun in possible:
            said = begun if possible else None
            break
        begun = (begun + place.token).lstrip()
    else:
        said = begun
    if said not in choices:
        return _LEAST
    doubt = 0.0
    for begun, place in reversed(walked):
        own = exp(place.logprob)
        sure, other = own * (1 - doubt), own * doubt
        for token, logprob in place.likeliest:
            if token != place.token and (possible := _possible(begun, token, choices)):
                if possible == {said}:
                    sure += exp(logprob)
                else:
                    other += exp(logprob)
        doubt = other / (sure + other)
    return log1p(-doubt) if doubt < 1 else _LEAST


def _possible(begun: str, token: str, choices: Collection[str]) -> set[str]:
    """The choices that an answer which `begun` so may still be, with this token behind it."""
    text = (begun + token).lstrip()
    found = {one for one in choices if one.startswith(text)}
    return found or ({begun} if begun in choices else set())
