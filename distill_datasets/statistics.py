"""What a number measured on some rows says of all rows: 95 % intervals.

Rows come in groups of related ones, such as translations of a text, which count together. Shares
have score intervals, every other number a bootstrap over groups. No interval has zero width: where
nothing varies, a bootstrap alone would claim certainty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError

Floats = NDArray[np.float64]

_Z = 1.959963984540054  # standard deviations: 97.5 % of a normal distribution lies below
_CELLS = 4_000_000  # weights in memory at once: 32 MB
_LEAST_FINITE = 0.975  # of the draws


@dataclass(frozen=True)
class Proportion:
    """The share of rows that are 1 and not 0, or the `difference` of two shares of the same rows.

    The rows of a difference are 1, 0 or -1. Intervals are by as many rows as the groups are worth.

    >>> Proportion([1, 1, 1, 0], ["a", "b", "c", "d"]).interval()["low"]
    0.3006...
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

    def interval(self) -> dict[str, float]:
        """`value`, `low` and `high`."""
        n = effective_rows(self.rows, self.groups)
        if self.difference:
            rows = np.asarray(self.rows)
            low, high = paired(float((rows > 0).mean()), float((rows < 0).mean()), n)
        else:
            low, high = wilson(self.value, n)
        return {"value": self.value, "low": low, "high": high}

    def __sub__(self, other: "Estimate") -> "Proportion":
        """Row by row."""
        assert isinstance(other, Proportion)
        return Proportion(np.subtract(self.rows, other.rows).tolist(), self.groups, True)


@dataclass(frozen=True)
class Bootstrap:
    """A value with its draws, one a resample of the groups.

    Estimates over the same groups share their resamples, so that the difference of two is the
    paired bootstrap. `n` is how many independent rows a value from 0 to 1 stands on, for where all
    draws are alike; a `difference` lies between -1 and 1.
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

    def interval(self) -> dict[str, float]:
        """The percentile interval; without varying draws that of a share of `n` rows, if known."""
        finite = self.draws[np.isfinite(self.draws)]
        if len(finite) < max(1, _LEAST_FINITE * len(self.draws)):
            return {"value": self.value}
        low, high = (float(end) for end in np.percentile(finite, [2.5, 97.5]))
        if not high > low:
            if self.n is None:
                return {"value": self.value}
            if self.difference:
                low, high = paired(max(self.value, 0.0), max(-self.value, 0.0), self.n)
            else:
                low, high = wilson(min(max(self.value, 0.0), 1.0), self.n)
        return {"value": self.value, "low": low, "high": high}


Estimate = Proportion | Bootstrap


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share among `n` independent rows.

    >>> [round(end, 4) for end in wilson(1.0, 315)]
    [0.988, 1.0]
    """
    middle = share + _Z**2 / (2 * n)
    margin = _Z * float(np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)))
    low, high = ((middle + side) / (1 + _Z**2 / n) for side in (-margin, margin))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def paired(up: float, down: float, n: float) -> tuple[float, float]:
    """The interval of `up` - `down`: the shares of `n` rows where one of two is right alone.

    Wald's with Bonett and Price's adjustment (2012): one more row on either side.
    """
    more, less = (up * n + 1) / (n + 2), (down * n + 1) / (n + 2)
    margin = _Z * float(np.sqrt((more + less - (more - less) ** 2) / (n + 2)))
    low, high = more - less - margin, more - less + margin
    return max(-1.0, min(low, up - down)), min(1.0, max(high, up - down))


def effective_rows(values: Sequence[float], groups: Sequence[str]) -> float:
    """How many independent rows are worth as much as these in their groups.

    Where all rows of each group agree it is the number of groups; where they are no more alike
    than any others, the number of rows.

        >>> effective_rows([1, 1, 0, 0, 1, 1], ["a", "a", "b", "b", "c", "c"])
        3.0
    """
    count = len(values) / len(set(groups))
    return float(len(values) / (1 + (count - 1) * intraclass_correlation(values, groups)))


def intraclass_correlation(values: Sequence[float], groups: Sequence[str]) -> float:
    """How alike the values of a group are, from 0 to 1, by one-way analysis of variance.

    1 where no group varies within, and for a single group, which can't be compared.
    """
    numbers = np.asarray(values, np.float64)
    _, members, sizes = np.unique(
        np.asarray(groups, dtype=str), return_inverse=True, return_counts=True
    )
    n, k = len(numbers), len(sizes)
    means = np.bincount(members, numbers) / sizes
    within = float(((numbers - means[members]) ** 2).sum())
    if k == 1 or within < 1e-12:
        return 1.0
    between = float((sizes * (means - numbers.mean()) ** 2).sum()) / (k - 1)
    within /= n - k
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    return min(1.0, max(0.0, (between - within) / (between + (size - 1) * within)))


def resamples(groups: Sequence[str], count: int, seed: int = 0) -> Iterator[Floats]:
    """Weights of the rows in `count` resamples of whole groups, a chunk of resamples at a time."""
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    size = len(names)
    chunk = max(1, _CELLS // len(members))
    generator = np.random.default_rng(seed)
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield times[:, members].astype(np.float64)
